"""ShinkaEvolve's discovered loss: the Switch loss, and a floor under starved experts that grows as the router concentrates."""

from __future__ import annotations

import math

from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope, load_E, mean_probability_E
from moesaic.balancing.mutual_information import entropy
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "shinka", paper="2509.19349", card="layers-and-balancing.md#shinkaevolve")
class Shinka(Balancer):
    """E sum_e f_e P_e + weight * s * sum_e max(0, tau - f_e), s = 0.5 + (1 - H(P) / ln E), detached; meant for global f.

    Taken literally the second term has no gradient, as f has none: its value here is the formula's, its gradient that of
    sum over starved experts (f_e < tau) of max(0, tau - P_e), which raises their P. `tau` is in units of 1 / E: 0.064 in
    the text, 0.64 in the published listing; the text's is the default. Per layer: hosts that sum layers instead of
    averaging them make it L times the paper's.
    """

    def __init__(self, coefficient: float = 0.01, tau: float = 0.064, weight: float = 0.1):
        if not 0 <= tau <= 1:
            raise BadInput(f"tau={tau}: a share of the even load 1 / E, from 0 to 1")
        self.coefficient, self.tau, self.weight = coefficient, tau, weight

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        experts = routing.num_experts
        f_E, p_E = load_E(routing, scope), mean_probability_E(routing, scope)
        tau = self.tau / experts
        short = (tau - f_E).clamp(min=0).sum()
        reach = ((tau - p_E).clamp(min=0) * (f_E < tau)).sum()
        floor = short + (reach - reach.detach())
        return experts * (f_E * p_E).sum() + self.weight * concentration(p_E) * floor


def concentration(p_E: Tensor) -> Tensor:
    """s = 0.5 + (1 - H(P) / ln E), detached: 0.5 for an even router, 1.5 for one that knows a single expert."""
    experts = p_E.numel()
    return 0.5 + (1 - entropy(p_E.detach()) / math.log(experts)) if experts > 1 else p_E.new_tensor(0.5)
