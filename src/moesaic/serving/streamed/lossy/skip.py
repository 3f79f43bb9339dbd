"""Skip: an expert that is not in memory and weighs little for a token is left out instead of read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Dispatch
from moesaic.serving.streamed.layer import Layer
from moesaic.serving.streamed.lossy.mode import Changed, Lossy, keep_pairs, without


@register("lossy", "skip", card="serving-and-scale.md#what-did-not-help-or-only-sometimes", exact=False)
class Skip(Lossy):
    """`threshold`: least share of a token's weights that an absent expert must have to be read (0: none is skipped). A
    token's largest is never skipped. `renormalise`: the others take over the weight of what was skipped."""

    def __init__(self, threshold: float = 0.1, renormalise: bool = True) -> None:
        if not (math.isfinite(threshold) and 0 <= threshold <= 1):
            raise BadInput(f"skip: threshold {threshold}: give a share from 0 to 1")
        self.threshold, self.renormalise = threshold, renormalise

    @property
    def neutral(self) -> bool:
        return self.threshold == 0

    def choose(self, layer: Layer, dispatch: Dispatch, ids_TK: Tensor | None, absent_E: Tensor) -> Changed:
        token_S, weight_S = dispatch.token_S, dispatch.weight_S
        size_S = weight_S.float().abs()
        zero_T = size_S.new_zeros(dispatch.tokens)
        total_T = zero_T.index_add(0, token_S, size_S).clamp(min=torch.finfo(torch.float32).tiny)
        largest_T = zero_T.scatter_reduce(0, token_S, size_S, "amax")
        small_S = (size_S / total_T[token_S] < self.threshold) & (size_S < largest_T[token_S])
        gone_S = absent_E[dispatch.expert_S] & small_S
        lost = int(gone_S.sum())
        if not lost:
            return Changed(dispatch, ids_TK)
        if self.renormalise:
            kept_T = zero_T.index_add(0, token_S, size_S.masked_fill(gone_S, 0))
            weight_S = torch.where(kept_T < total_T, total_T / kept_T, 1.0)[token_S].to(weight_S.dtype) * weight_S
        return Changed(keep_pairs(dispatch, ~gone_S, weight_S), without(ids_TK, dispatch, gone_S), lost)
