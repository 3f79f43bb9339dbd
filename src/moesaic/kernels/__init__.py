"""Grouped expert computation: a naive twin, a torch path, a CPU path, a Triton path, and one dispatcher."""

from moesaic.kernels.dispatch import choose, expert_mlp
from moesaic.kernels.weights import Weights

__all__ = ["Weights", "choose", "expert_mlp"]
