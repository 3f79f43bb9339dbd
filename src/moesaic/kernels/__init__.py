"""Grouped expert computation: a naive twin, a torch path, a CPU path, a Triton path, and one dispatcher."""
