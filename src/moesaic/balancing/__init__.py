"""Balancing: losses over a routing, and controllers that move a selection bias after the optimiser step."""
