"""Changes to a finished token-major routing: slots emptied, experts put in, the token's total weight kept.

T tokens, K slots per token. -1 is an empty slot. Weights stay differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.routing import Routing


def token_major(routing: Routing) -> tuple[Tensor, Tensor]:
    """Ids and weights of a routing that has them, which every routing at an experts call does."""
    assert routing.experts_TK is not None
    assert routing.weights_TK is not None
    return routing.experts_TK, routing.weights_TK


def empty(routing: Routing, gone_TK: Tensor) -> Routing:
    """Empty the marked slots; what is left of a token is scaled to its former sum. A token with nothing left runs no expert.

    Tokens without a marked slot keep their weights bit for bit.
    """
    ids_TK, weights_TK = token_major(routing)
    if not bool(gone_TK.any()):
        return routing
    kept_TK = weights_TK.masked_fill(gone_TK, 0)
    return routing.replace(experts_TK=ids_TK.masked_fill(gone_TK, -1), weights_TK=rescaled(kept_TK, weights_TK))


def rescaled(weights_TK: Tensor, like_TK: Tensor) -> Tensor:
    """Weights scaled per token to the sum of `like_TK`; rows equal to it, and rows of zeros, stay as they are."""
    total_T1, now_T1 = like_TK.float().sum(1, keepdim=True), weights_TK.float().sum(1, keepdim=True)
    same_T1 = (weights_TK == like_TK).all(1, keepdim=True) | (now_T1 == 0)
    scale_T1 = torch.where(same_T1, 1.0, total_T1 / now_T1.masked_fill(same_T1, 1.0))
    return (weights_TK.float() * scale_T1).to(like_TK.dtype)


def below(routing: Routing, threshold: float) -> Tensor:
    """Slots whose share of their token's weight is below the threshold, bool [T, K]; never a token's largest."""
    ids_TK, weights_TK = token_major(routing)
    size_TK = weights_TK.detach().float().abs().masked_fill(ids_TK < 0, 0)
    small_TK = size_TK < threshold * size_TK.sum(1, keepdim=True)
    return small_TK & (size_TK < size_TK.amax(1, keepdim=True)) & (ids_TK >= 0)
