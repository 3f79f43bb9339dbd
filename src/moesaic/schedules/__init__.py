"""Schedules: numbers that follow the training step, and sometimes the layer: k(t), tau(t), a share of dropped experts."""
