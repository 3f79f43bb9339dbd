"""HMoE's parameter penalty."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope, load_E, mean_probability_E
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "p_penalty", paper="2408.10681", card="layers-and-balancing.md#hmoe")
class ParameterPenalty(Balancer):
    """E * sum_e M_e P_e, M_e = (share of tokens that run e) * h_e / mean h: penalises activated parameters, not counts.

    Equal widths make it K times the Switch loss. `widths` default to equal.
    """

    def __init__(self, coefficient: float = 0.1, widths: Sequence[float] | None = None):
        self.coefficient, self.widths = coefficient, widths

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        experts = routing.num_experts
        tokens = routing.tokens if scope.mask_T is None else int(scope.mask_T.sum())
        pairs = routing.counts_E(scope.mask_T).sum() if scope.counts_E is None else scope.counts_E.sum()
        widths = [1.0] * experts if self.widths is None else self.widths
        h_E = torch.tensor(widths, dtype=torch.float32, device=routing.logits_TE.device)
        activated_E = load_E(routing, scope) * (pairs / max(tokens, 1)) * h_E / h_E.mean()
        return experts * (activated_E * mean_probability_E(routing, scope)).sum()
