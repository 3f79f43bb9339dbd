"""THOR: no router; a random expert per forward, trained to agree with any other."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.router import Router, empty_padding


@register("routing", "thor", paper="2110.04260", card="routing.md#thor")
class Thor(Router):
    """Training: each forward draws one expert, uniformly, for all tokens of the call; weight 1.

    Evaluation: "ensemble" runs all experts at 1 / E (deterministic, the cost of E); "token" and "sentence" draw one per
    token or per sentence (the released sentence mask runs over time steps; here it is the sentence). Draws come from
    `ctx.generator`, else from torch's. Nothing is learned here: the agreement is a loss over two forwards
    (moesaic.training.consistency). Logits are the choice itself, so that losses and traces can read it.
    """

    def __init__(self, dim: int, experts: int, evaluation: Literal["ensemble", "token", "sentence"] = "ensemble"):
        super().__init__(experts, 1)
        if evaluation not in ("ensemble", "token", "sentence"):
            raise BadInput(f"evaluation={evaluation!r}: one of ensemble, token, sentence")
        self.evaluation = evaluation
        self.needs = frozenset({"sequence_ids"} if evaluation == "sentence" else ())

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        tokens, device = x_TD.shape[0], x_TD.device
        if not ctx.training and self.evaluation == "ensemble":
            experts_TK = torch.arange(self.num_experts, device=device).expand(tokens, -1)
        else:
            experts_TK = self._draw(tokens, ctx, device).unsqueeze(1)
        chosen_TE = one_hot(experts_TK, self.num_experts).sum(1).float()
        share = 1.0 / experts_TK.shape[1]
        weights_TK = torch.full(experts_TK.shape, share, device=device)
        return empty_padding(Routing(chosen_TE, chosen_TE * share, experts_TK, weights_TK), ctx)

    def _draw(self, tokens: int, ctx: RoutingContext, device: torch.device) -> Tensor:
        groups_T = torch.arange(tokens, device=device)
        if ctx.training:
            groups_T = torch.zeros_like(groups_T)
        elif self.evaluation == "sentence":
            groups_T = torch.unique(ctx.need("sequence_ids", "thor"), return_inverse=True)[1]
        groups = int(groups_T.max()) + 1 if tokens else 0
        drawn_G = torch.randint(self.num_experts, (groups,), generator=ctx.generator, device=device)
        return drawn_G[groups_T]
