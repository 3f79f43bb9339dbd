"""The router z-loss."""

from __future__ import annotations

from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope, masked_mean
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "z", paper="2202.08906", card="layers-and-balancing.md#lbl")
class Z(Balancer):
    """mean_t logsumexp(l_t)^2: keeps logits small, so that rounding and saturation do no harm."""

    def __init__(self, coefficient: float = 1e-3):
        self.coefficient = coefficient

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        return masked_mean(routing.logits_TE.float().logsumexp(-1).square(), scope.mask_T)
