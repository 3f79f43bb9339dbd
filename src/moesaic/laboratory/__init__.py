"""Experiments: many trainings side by side (`moesaic sweep`), and the comparison of all methods (`moesaic lab`)."""
