"""ModuleFormer's mutual-information loss: tokens that decide, and an even marginal."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope, masked_mean, probabilities
from moesaic.core.registry import register
from moesaic.core.routing import Routing


def entropy(p: Tensor) -> Tensor:
    """-sum p ln p along the last axis; 0 ln 0 = 0."""
    return -torch.special.xlogy(p, p.clamp(min=1e-20)).sum(-1)


@register("balancing", "mutual_information", paper="2306.04640", card="layers-and-balancing.md#moduleformer")
class MutualInformation(Balancer):
    """H(m | x) - H(m), between -ln E (every token decided, all modules even) and 0 (uniform, or constant routing)."""

    def __init__(self, coefficient: float = 0.01):
        self.coefficient = coefficient

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        p_TE = probabilities(routing)
        return masked_mean(entropy(p_TE), scope.mask_T) - entropy(masked_mean(p_TE, scope.mask_T))
