"""MoME: Matryoshka experts; one router serves every token granularity."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.routing.topk import TopK


@register("routing", "mome", paper="2510.04136", card="routing.md#mome")
class MoME(TopK):
    """g = softmax(h W^T), top-k, not renormalised, over bottleneck experts beside a frozen model.

    The router is not told the scale, so equal hidden vectors route equally at any of them, and one instance serves all
    (`pool` makes the coarse sequences). The bank is `adapter` with act="gelu" and zero_start=True: the start is the
    frozen model. Balance each scale by itself, or the finest outweighs the rest: one forward per scale with `switch`, whose
    losses are then averaged with the scales' cross-entropies, or `sequence` when scales share a forward.
    """

    bank = "adapter"

    def __init__(self, dim: int, experts: int, k: int = 4):
        super().__init__(dim, experts, k, convention="softmax")


def pool(x_BND: Tensor, rate: int) -> Tensor:
    """Mean of every `rate` consecutive tokens, [B, ceil(N / rate), D]; the last may stand for fewer. BadInput for rate < 1."""
    if rate < 1:
        raise BadInput(f"rate={rate}: tokens per pooled token, at least 1")
    batch, length, dim = x_BND.shape
    short = -length % rate
    total = torch.nn.functional.pad(x_BND, (0, 0, 0, short)).view(batch, -1, rate, dim).sum(2)
    count_N = torch.full((total.shape[1],), rate, device=x_BND.device)
    if short:
        count_N[-1] = rate - short
    return total / count_N.view(1, -1, 1).to(total.dtype)
