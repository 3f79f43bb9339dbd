"""Serving: tokens out of a model, and what each expert did for them."""
