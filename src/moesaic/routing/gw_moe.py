"""GW-MoE: in fine-tuning, tokens that the router is unsure of go to every expert."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import pad

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.pools import pools
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.score import LinearScore
from moesaic.routing.select import top_k
from moesaic.routing.weigh import gather, renormalise


@register("routing", "gw_moe", paper="2406.12375", card="routing.md#gw-moe", needs={"sequence_ids"})
class GWMoE(Router):
    """Training: a token with H = -sum p log(p + 1e-5) >= `threshold` (nats) runs all experts, weighted by p.

    At most `slots` such tokens per sequence, first come first served; padding takes none. Everything else, and all of
    evaluation, is plain top-k of p (not renormalised, as Switch; `renormalise` for the top-2 kind). The default threshold
    is the paper's 1.6 nats of ln 8, as a share of ln E; above ln E it is ordinary fine-tuning. The released loop overwrites
    outputs and never runs the experts on broadcast tokens; here the paper's sum is followed.
    """

    needs = frozenset({"sequence_ids"})

    def __init__(
        self,
        dim: int,
        experts: int,
        k: int = 1,
        threshold: float | None = None,
        slots: int = 8,
        renormalise: bool = False,
    ):
        super().__init__(experts, k)
        if slots < 0 or (threshold is not None and threshold < 0):
            raise BadInput(f"threshold={threshold}, slots={slots}: neither can be negative")
        self.threshold = 1.6 / math.log(8) * math.log(experts) if threshold is None else threshold
        self.slots, self.renormalise = slots, renormalise
        self.score = LinearScore(dim, experts)

    def as_top_k(self) -> tuple[Tensor, bool] | None:
        assert isinstance(self.score, LinearScore)
        return self.score.weight, self.renormalise

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        logits_TE = self.score(x_TD, ctx)
        probs_TE = logits_TE.softmax(-1)
        chosen_TK = top_k(logits_TE, self.k)
        weights_TK = gather(probs_TE, chosen_TK)
        if self.renormalise:
            weights_TK = renormalise(weights_TK)
        if ctx.training:
            all_T1 = self.broadcast(probs_TE.detach(), ctx).unsqueeze(1)
            order_TE = top_k(logits_TE, self.num_experts)
            every_TE = probs_TE.gather(1, order_TE)
            usual_TE = pad(weights_TK, (0, self.num_experts - self.k))
            outside_TE = (~all_T1).repeat(1, self.num_experts)
            outside_TE[:, : self.k] = False
            chosen_TK = order_TE.masked_fill(outside_TE, -1)
            weights_TK = every_TE.where(all_T1, usual_TE)
        return empty_padding(Routing(logits_TE, probs_TE, chosen_TK, weights_TK), ctx)

    def broadcast(self, probs_TE: Tensor, ctx: RoutingContext) -> Tensor:
        """True for the tokens that go to every expert, bool [T]."""
        entropy_T = -(probs_TE * (probs_TE + 1e-5).log()).sum(-1)
        unsure_T = entropy_T >= self.threshold
        if ctx.mask is not None:
            unsure_T = unsure_T & ctx.mask
        for index_t in pools("sequence", len(unsure_T), ctx, "gw_moe", unsure_T.device):
            unsure_t = unsure_T[index_t]
            unsure_T[index_t] = unsure_t & (unsure_t.cumsum(0) <= self.slots)
        return unsure_T
