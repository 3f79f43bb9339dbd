"""AdaMoE: null experts give each token its own number of true ones."""

from __future__ import annotations

from torch import Tensor

from moesaic.core.context import RoutingContext
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.score import LinearScore
from moesaic.routing.select import top_k
from moesaic.routing.weigh import gather, renormalise


@register("routing", "adamoe", paper="2406.13233", card="routing.md#adamoe")
class AdaMoE(Router):
    """Top-k over `experts` true rows and `nulls` zero-cost ones; weights renormalise over the true choices.

    A token whose choices are all null gets 0. At balance a token runs k * experts / (experts + nulls) true experts.
    Logits, probabilities and `selected_TK` span true and null rows; `experts_TK` holds true experts only, so a bank
    of `experts` serves it. The balance loss averages the null loads (balancing/adamoe.py).
    """

    def __init__(self, dim: int, experts: int, k: int = 4, nulls: int | None = None):
        nulls = experts if nulls is None else nulls
        super().__init__(experts + nulls, k)
        self.true_experts, self.nulls = experts, nulls
        self.score = LinearScore(dim, experts + nulls)

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        logits_TE = self.score(x_TD, ctx)
        probs_TE = logits_TE.softmax(-1)
        selected_TK = top_k(logits_TE, self.k)
        experts_TK = selected_TK.masked_fill(selected_TK >= self.true_experts, -1)
        weights_TK = renormalise(gather(probs_TE, experts_TK))
        return empty_padding(Routing(logits_TE, probs_TE, experts_TK, weights_TK, selected_TK), ctx)
