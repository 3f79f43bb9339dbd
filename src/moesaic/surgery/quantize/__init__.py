"""Quantise: fewer bits per weight, allocated or calibrated."""
