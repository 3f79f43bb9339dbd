"""Monet's uniformity loss: the mean gate of every key as even as can be."""

from __future__ import annotations

from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope, masked_mean, probabilities
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "uniformity", paper="2412.04139", card="layers-and-balancing.md#monet")
class Uniformity(Balancer):
    """-(1 / n) sum over keys of ln(mean over tokens of the gate), averaged over sides and heads of a keyed routing.

    At least ln n, there when the mean is even. Other routings are one head of E keys. A key that no token kept
    counts as 1e-6: it can get no gradient through its gate.
    """

    def __init__(self, coefficient: float = 1e-3):
        self.coefficient = coefficient

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        gates = probabilities(routing) if routing.keyed_T2HN is None else routing.keyed_T2HN
        return -masked_mean(gates, scope.mask_T).clamp(min=1e-6).log().mean()
