"""HMoE's parameter penalty."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope, load_E, mean_probability_E, slots_per_token
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "p_penalty", paper="2408.10681", card="layers-and-balancing.md#hmoe")
class ParameterPenalty(Balancer):
    """E * sum_e M_e P_e, M_e = (share of tokens that run e) * h_e / mean h: penalises activated parameters, not counts.

    Equal widths make it K times the Switch loss. Without `widths`, h is what the bank's experts cost (`cost_E`: FLOPs per
    token), whatever they are: unequal widths, cheap kinds, experts that compute nothing. Alone it can starve large experts.
    """

    def __init__(self, coefficient: float = 0.1, widths: Sequence[float] | None = None):
        self.coefficient, self.widths = coefficient, widths

    def bind_bank(self, cost_E: Tensor) -> None:
        if self.widths is None and cost_E.sum() > 0:
            self.widths = cost_E.tolist()

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        experts = routing.num_experts
        widths = [1.0] * experts if self.widths is None else self.widths
        if len(widths) != experts:
            raise BadInput(f"p_penalty: {len(widths)} widths for a router of {experts} rows")
        h_E = torch.tensor(widths, dtype=torch.float32, device=routing.logits_TE.device)
        activated_E = load_E(routing, scope) * slots_per_token(routing, scope) * h_E / h_E.mean()
        return experts * (activated_E * mean_probability_E(routing, scope)).sum()
