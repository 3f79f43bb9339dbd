"""COMET's regularisers: the entropy of each tree's leaves, and of the permutation while it is searched."""

from __future__ import annotations

from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope, masked_mean, probabilities
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "comet", paper="2306.02824", card="routing.md#comet")
class CometEntropy(Balancer):
    """mean_t sum over trees and leaves of -v log(v + 1e-6), plus `permutation` times the permutation's entropy.

    It drives every split to 0 or 1, so that at most K experts keep a weight. Reads what a tree gate (comet, dselect_k)
    leaves in `routing.aux`; for other routers the gate is the probabilities themselves. The paper's 1e-4 on the permutation
    stands outside the coefficient: with the default 0.1 that is 1e-3 here.
    """

    def __init__(self, coefficient: float = 0.1, permutation: float = 1e-3):
        self.coefficient, self.permutation = coefficient, permutation

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        total = masked_mean(gate_entropy(gate_paths(routing)), scope.mask_T)
        entropy = routing.aux.get("permutation_entropy")
        return total if entropy is None else total + self.permutation * entropy


def gate_paths(routing: Routing) -> Tensor:
    """Each selector's distribution, [T, K, E]."""
    path_TKE = routing.aux.get("path_TKE")
    return probabilities(routing).unsqueeze(1) if path_TKE is None else path_TKE


def gate_entropy(path_TKE: Tensor) -> Tensor:
    """sum over selectors and leaves of -v log(v + 1e-6), [T]."""
    return -(path_TKE * (path_TKE + 1e-6).log()).sum((1, 2))
