"""DSelect-k's regularisers: entropy of the selectors, and mass on codes that name an expert."""

from __future__ import annotations

from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope, masked_mean
from moesaic.balancing.comet import gate_entropy, gate_paths
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "dselect_k", paper="2106.03760", card="routing.md#comet")
class DSelectKEntropy(Balancer):
    """mean_t sum over selectors of the entropy of r and, when E is no power of two, of 1 / (1e-6 + sum of reachable r)."""

    def __init__(self, coefficient: float = 0.01):
        self.coefficient = coefficient

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        path_TKE = gate_paths(routing)
        total_T = gate_entropy(path_TKE)
        experts = routing.num_experts
        if experts & (experts - 1):
            total_T = total_T + (1 / (1e-6 + path_TKE.sum(2))).sum(1)
        return masked_mean(total_T, scope.mask_T)
