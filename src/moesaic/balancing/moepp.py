"""MoE++'s heterogeneous balance loss."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope, load_E, mean_probability_E
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "moepp", paper="2410.07348", card="routing.md#moe++")
class MoEPlusPlusLoad(Balancer):
    """sum_e eta_e f_e P_e, eta = 1 for FFN rows and tau for the last `cheap` rows; f is the share of tokens.

    Smaller tau sends more tokens to the zero-computation experts.
    """

    def __init__(self, coefficient: float = 0.01, cheap: int = 3, tau: float = 0.75):
        self.coefficient, self.cheap, self.tau = coefficient, cheap, tau

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        experts, slots = routing.num_experts, 1 if routing.experts_TK is None else routing.experts_TK.shape[1]
        row_E = torch.arange(experts, device=routing.logits_TE.device)
        eta_E = torch.where(row_E >= experts - self.cheap, self.tau, 1.0)
        return (eta_E * slots * load_E(routing, scope) * mean_probability_E(routing, scope)).sum()
