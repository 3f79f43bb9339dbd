"""The Switch / GShard load-balance loss."""

from __future__ import annotations

from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope, load_E, mean_probability_E
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "switch", paper="2101.03961", card="layers-and-balancing.md#lbl")
class Switch(Balancer):
    """E * sum_e f_e P_e, f detached and summing to 1 (transformers' version sums to K: K times as strong).

    Uniform P gives exactly 1; 1 is not a lower bound. Padding is in neither f nor P.
    """

    def __init__(self, coefficient: float = 0.01):
        self.coefficient = coefficient

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        return routing.num_experts * (load_E(routing, scope) * mean_probability_E(routing, scope)).sum()
