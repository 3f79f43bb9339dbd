"""AdaMoE's load loss: all null experts share one averaged load."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.balancing.balancer import Balancer, Scope, load_E, mean_probability_E
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "adamoe", paper="2406.13233", card="routing.md#adamoe")
class AdaMoELoad(Balancer):
    """(n + m) * sum_i f_i P_i with f of every null row replaced by the mean null load: only their total matters."""

    def __init__(self, coefficient: float = 0.01, true_experts: int | None = None):
        self.coefficient, self.true_experts = coefficient, true_experts

    def bind(self, router: nn.Module) -> AdaMoELoad:
        self.true_experts = getattr(router, "true_experts", self.true_experts)
        return self

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        f_E = load_E(routing, scope)
        true = routing.num_experts // 2 if self.true_experts is None else self.true_experts
        if true < routing.num_experts:
            f_E = torch.cat([f_E[:true], f_E[true:].mean().expand(routing.num_experts - true)])
        return routing.num_experts * (f_E * mean_probability_E(routing, scope)).sum()
