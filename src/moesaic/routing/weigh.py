"""Weights: scores [T, E] and a selection [T, K] -> weights [T, K]; empty slots weigh 0."""

from __future__ import annotations

from torch import Tensor


def gather(values_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """values at the selected experts, 0 at empty slots."""
    picked_TK = values_TE.gather(1, experts_TK.clamp(min=0))
    return picked_TK.masked_fill(experts_TK < 0, 0.0)


def renormalise(weights_TK: Tensor, eps: float = 1e-20) -> Tensor:
    """Weights divided by their sum; a token whose weights are all 0 keeps 0 (no division by zero)."""
    return weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=eps)
