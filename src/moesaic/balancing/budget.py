"""Duo-LLM's budget loss: the share of big experts, over all layers and tokens, near a target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope, masked_mean, probabilities
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "budget", paper="2410.10846", card="routing.md#duo-llm")
class Budget(Balancer):
    """(mean over layers and tokens of P_big - target)^2, P_big the probability of row 0: `over` all layers' routings.

    The gradient pushes every layer's P_big alike. `loss` is that of one layer alone, stricter than the paper's. Soft
    routing can meet a target with 0.5 everywhere: sharpen it, and judge the hard routing. Coefficient 1 is the card's.
    """

    def __init__(self, coefficient: float = 1.0, target: float = 0.5):
        if not 0 <= target <= 1:
            raise BadInput(f"target={target}: a share of the layers, from 0 to 1")
        self.coefficient, self.target = coefficient, target

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        return self.over([routing], scope)

    def over(self, routings: Sequence[Routing], scope: Scope) -> Tensor:
        big_L = torch.stack([masked_mean(probabilities(r)[:, 0], scope.mask_T) for r in routings])
        return (big_L.mean() - self.target).square()
