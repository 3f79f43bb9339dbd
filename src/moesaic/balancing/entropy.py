"""The entropy loss of top-p routers."""

from __future__ import annotations

from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope, masked_mean, probabilities
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "entropy", paper="2403.07652", card="routing.md#dynamic_moe")
class Entropy(Balancer):
    """mean_t H(p_t), minimised: keeps p sharp, so that a probability mass takes few experts."""

    def __init__(self, coefficient: float = 1e-4):
        self.coefficient = coefficient

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        p_TE = probabilities(routing)
        return masked_mean(-(p_TE * p_TE.clamp(min=1e-20).log()).sum(-1), scope.mask_T)
