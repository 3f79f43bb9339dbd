"""Steering: the same weights, other behaviour; an option of a request, never of a checkpoint."""
