"""Distil: train a student on what a teacher says."""
