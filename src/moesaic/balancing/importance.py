"""Shazeer's importance loss."""

from __future__ import annotations

from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope, mean_probability_E
from moesaic.core.registry import register
from moesaic.core.routing import Routing


def squared_variation(values_E: Tensor) -> Tensor:
    """CV^2: variance over squared mean."""
    return values_E.var(unbiased=False) / values_E.mean().square().clamp(min=1e-10)


@register("balancing", "importance", paper="1701.06538", card="routing.md#topk")
class Importance(Balancer):
    """CV^2(sum_t p): the squared coefficient of variation of the summed probabilities."""

    def __init__(self, coefficient: float = 0.01):
        self.coefficient = coefficient

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        return squared_variation(mean_probability_E(routing, scope))
