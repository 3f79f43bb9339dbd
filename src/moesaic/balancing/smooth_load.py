"""The smooth load loss of noisy gates."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope, probabilities
from moesaic.balancing.importance import squared_variation
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "smooth_load", paper="1701.06538", card="routing.md#topk")
class SmoothLoad(Balancer):
    """CV^2(mean_t Phi((l - kth) / noise_std)): the chance that fresh noise keeps an expert among the k best.

    Needs the noise scale that a noisy router leaves in `routing.aux["noise_scale"]`; 0 without it (evaluation).
    """

    def __init__(self, coefficient: float = 0.01):
        self.coefficient = coefficient

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        scale = routing.aux.get("noise_scale")
        if scale is None or routing.experts_TK is None:
            return probabilities(routing).sum() * 0.0
        logits_TE = routing.logits_TE
        kth_T1 = logits_TE.topk(routing.experts_TK.shape[1], dim=-1).values[:, -1:]
        chance_TE = torch.special.ndtr((logits_TE - kth_T1) / scale.clamp(min=1e-6))
        rows = chance_TE if scope.mask_T is None else chance_TE[scope.mask_T]
        return squared_variation(rows.mean(0))
