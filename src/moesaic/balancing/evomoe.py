"""EvoMoE's load loss over a gate of varying width."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope, masked_mean
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "evomoe", paper="2112.14397", card="routing.md#evomoe")
class EvoMoELoad(Balancer):
    """E^2 * mean_e(mean_t weight_te * mean_t active_te): the weights carry the gradient, the shares of use do not.

    Even top-1 use with weights of w gives w; all experts at 1 / E each give E * (1 / E) * E: E.
    """

    def __init__(self, coefficient: float = 0.01):
        self.coefficient = coefficient

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        if routing.experts_TK is None or routing.weights_TK is None:
            raise BadInput("the evomoe loss reads a token-major routing: weights and experts per token")
        index_TK, active_TK = routing.experts_TK.clamp(min=0), routing.experts_TK >= 0
        zero_TE = torch.zeros_like(routing.logits_TE, dtype=torch.float32)
        weight_TE = zero_TE.scatter_add(1, index_TK, routing.weights_TK.float() * active_TK)
        active_TE = zero_TE.scatter_add(1, index_TK, active_TK.float())
        both_E = masked_mean(weight_TE, scope.mask_T) * masked_mean(active_TE, scope.mask_T)
        return routing.num_experts**2 * both_E.mean()
