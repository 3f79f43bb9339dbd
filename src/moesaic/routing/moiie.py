"""MoIIE: experts of one modality, experts of both, and a router for each modality."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.score import LinearScore
from moesaic.routing.select import top_k
from moesaic.routing.weigh import gather, renormalise


@register("routing", "moiie", paper="2508.09779", card="routing.md#moiie", needs={"modality_ids"})
class MoIIE(Router):
    """Modality 1 (vision) chooses among experts 0 .. E - own - 1, any other (text) among own .. E - 1: top-k, renormalised.

    So the first `own` experts are vision's, the last `own` text's, those between are shared; default E / 4, as E/4, E/2, E/4.
    Scores outside a token's candidates are -inf. The published code hard-codes an offset of 1, right for E = 4 only.
    `next_decides` keeps its quirk for old weights: a token counts as vision only if the next one is vision too, so the
    last patch of an image is routed as text (and routing then sees one token ahead, of the same sequence).
    """

    needs = frozenset({"modality_ids"})

    def __init__(
        self,
        dim: int,
        experts: int,
        k: int = 2,
        own: int | None = None,
        jitter: float = 0.0,
        next_decides: bool = False,
    ):
        own = experts // 4 if own is None else own
        super().__init__(experts, k)
        if own < 0 or 2 * own > experts:
            raise BadInput(f"own={own}: two modalities cannot each own that many of {experts} experts")
        if k > experts - own:
            raise BadInput(f"k={k}: a token has {experts - own} candidates of {experts} experts")
        self.own, self.next_decides = own, next_decides
        self.causal = not next_decides
        if next_decides:
            self.needs = self.needs | {"sequence_ids"}
        self.vision_score = LinearScore(dim, experts - own, jitter=jitter)
        self.text_score = LinearScore(dim, experts - own, jitter=jitter)

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        vision_T = ctx.need("modality_ids", "moiie") == 1
        if self.next_decides:
            row_T = ctx.need("sequence_ids", "moiie with next_decides")
            follows_T = (row_T.roll(-1) == row_T).index_fill(0, torch.tensor([-1], device=row_T.device), False)
            vision_T = vision_T & vision_T.roll(-1) & follows_T
        shut_To = x_TD.new_full((x_TD.shape[0], self.own), float("-inf"), dtype=torch.float32)
        vision_TE = torch.cat([self.vision_score(x_TD, ctx), shut_To], 1)
        text_TE = torch.cat([shut_To, self.text_score(x_TD, ctx)], 1)
        logits_TE = torch.where(vision_T.unsqueeze(1), vision_TE, text_TE)
        probs_TE = logits_TE.softmax(-1)
        experts_TK = top_k(logits_TE, self.k)
        weights_TK = renormalise(gather(probs_TE, experts_TK))
        aux = {"vision_T": vision_T} if ctx.training else {}
        return empty_padding(Routing(logits_TE, probs_TE, experts_TK, weights_TK, aux=aux), ctx)
