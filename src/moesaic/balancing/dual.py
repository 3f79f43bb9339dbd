"""The balanced-assignment programme behind bias controllers, and its dual.

Primal: maximise sum g_te x_te with sum_e x_te = K for every token and sum_t x_te = C = K T / E for every expert. The bias is
the price of the second constraint: for given b the best x is the top-K of g + b, and b moves by the error C - n_e
(2512.03915; layers-and-balancing.md#alf-lb).
"""

from __future__ import annotations

import torch
from torch import Tensor


def assign(scores_TE: Tensor, bias_E: Tensor, k: int) -> Tensor:
    """The experts of each token for these prices, int64 [T, K]."""
    return (scores_TE + bias_E).topk(k, dim=-1).indices


def counts(scores_TE: Tensor, bias_E: Tensor, k: int) -> Tensor:
    """n_e, in the dtype of the scores."""
    chosen_TK = assign(scores_TE, bias_E, k)
    return torch.bincount(chosen_TK.flatten(), minlength=scores_TE.shape[1]).to(scores_TE.dtype)


def dual(scores_TE: Tensor, bias_E: Tensor, k: int) -> Tensor:
    """d(b) = sum_t topKsum(g_t + b) - C sum_e b_e: convex, unmoved by b + c, and never below what balance can reach."""
    capacity = k * scores_TE.shape[0] / scores_TE.shape[1]
    return (scores_TE + bias_E).topk(k, dim=-1).values.sum() - capacity * bias_E.sum()


def subgradient(scores_TE: Tensor, bias_E: Tensor, k: int) -> Tensor:
    """n_e - C, a subgradient of the dual at b, [E]."""
    return counts(scores_TE, bias_E, k) - k * scores_TE.shape[0] / scores_TE.shape[1]
