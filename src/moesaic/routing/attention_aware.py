"""Attention-aware routing (Attn-SMoE): a token borrows the routing of the tokens it attends to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.core.context import RoutingContext
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.score import LinearScore
from moesaic.routing.select import top_k
from moesaic.routing.weigh import gather, renormalise


@register("routing", "attention_aware", paper="2505.00792", card="routing.md#attn-smoe", needs={"attention"})
class AttentionAware(Router):
    """q~ = A q with A the attention of the block before, averaged over heads; top-k of q~, renormalised.

    `ctx.attention.mix(q)` runs the attention once more with the routing probabilities as values, so A is never
    materialised. The experts still see the token itself. Load losses read q~. Causal when the attention is.
    """

    needs = frozenset({"attention"})

    def __init__(self, dim: int, experts: int, k: int = 2):
        super().__init__(experts, k)
        self.score = LinearScore(dim, experts)
        self.offset_E = nn.Parameter(torch.zeros(experts))

    def flops_per_token(self, length: int = 1) -> float:
        """The mixing reads every token of the sequence: 2 N E more. The scores that it mixes by are the attention's."""
        return super().flops_per_token() + 2.0 * length * self.num_experts

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        logits_TE = self.score(x_TD, ctx) + self.offset_E
        mixed_TE = ctx.need("attention", "attention_aware").mix(logits_TE.softmax(-1)).float()
        experts_TK = top_k(mixed_TE, self.k)
        weights_TK = renormalise(gather(mixed_TE, experts_TK))
        return empty_padding(Routing(logits_TE, mixed_TE, experts_TK, weights_TK), ctx)
