"""Unlearn: make a model forget a text and keep the rest."""
