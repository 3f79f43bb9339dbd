"""MoIIE's load losses: one per modality, over its own tokens and candidates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.balancing.balancer import Balancer, Scope, masked_mean, probabilities, share_of
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "moiie", paper="2508.09779", card="routing.md#moiie")
class ModalityLoad(Balancer):
    """sum over modalities of (E - own) * sum_e f_e P_e, f and P over that modality's tokens; 1 each at balance.

    Reads `routing.aux["vision_T"]` (training only; without it all tokens are one modality). A modality without tokens
    gives 0. Padding is in neither.
    """

    def __init__(self, coefficient: float = 0.001, own: int = 0):
        self.coefficient, self.own = coefficient, own

    def bind(self, router: nn.Module) -> ModalityLoad:
        self.own = getattr(router, "own", self.own)
        return self

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        p_TE = probabilities(routing)
        vision_T = routing.aux.get("vision_T")
        real_T = torch.ones_like(p_TE[:, 0], dtype=torch.bool) if scope.mask_T is None else scope.mask_T
        parts = {"load": real_T} if vision_T is None else {"vision": real_T & vision_T, "text": real_T & ~vision_T}
        total = p_TE.sum() * 0.0
        for name, mask_T in parts.items():
            f_E = share_of(scope.tally(name, routing.counts_E(mask_T)))
            total = total + (routing.num_experts - self.own) * (f_E * masked_mean(p_TE, mask_T)).sum()
        return total
