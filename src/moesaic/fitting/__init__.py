"""Fitting: the plan by which a model fits a machine, chosen from measured ones."""
