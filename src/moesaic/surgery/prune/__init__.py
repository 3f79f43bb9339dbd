"""Prune: fewer experts, chosen by what a text showed."""
