"""Monet's ambiguity loss: every head should be sure of one key."""

from __future__ import annotations

from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope, masked_mean, probabilities
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "ambiguity", paper="2412.04139", card="layers-and-balancing.md#monet")
class Ambiguity(Balancer):
    """Mean over tokens (and sides and heads of a keyed routing) of 1 - the largest gate: 0 for one-hot gates."""

    def __init__(self, coefficient: float = 1e-3):
        self.coefficient = coefficient

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        gates = probabilities(routing) if routing.keyed_T2HN is None else routing.keyed_T2HN
        return masked_mean(1 - gates.amax(-1), scope.mask_T).mean()
