"""RMoE: a GRU across depth carries each token's routing memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moesaic.core.context import RoutingContext
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.score import LinearScore
from moesaic.routing.select import top_k
from moesaic.routing.weigh import gather, renormalise


@register("routing", "rmoe", paper="2408.06793", card="routing.md#rmoe", needs={"previous"})
class RMoE(Router):
    """u = x A_i^T, h_i = GRU(u, h_{i-1}), logits = h_i B_i^T; softmax, top-k, renormalised.

    A_i and B_i are per layer; the GRU is shared by all layers (`RMoE.shared`), h_0 = 0, and the state flows with
    gradient. Depth is the time axis: a token's routing never depends on another token, so decoding needs no cache.
    """

    needs = frozenset({"previous"})

    def __init__(self, dim: int, experts: int, k: int = 2, rank: int = 128, gru: nn.GRUCell | None = None):
        super().__init__(experts, k)
        self.down = LinearScore(dim, rank)
        self.up = LinearScore(rank, experts)
        self.gru = nn.GRUCell(rank, rank) if gru is None else gru

    @staticmethod
    def shared(dim: int, rank: int = 128, **options: Any) -> dict[str, nn.Module]:
        return {"gru": nn.GRUCell(rank, rank)}

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        previous_TR = ctx.need("previous", "rmoe")
        u_TR = self.down(x_TD, ctx)
        with torch.autocast(x_TD.device.type, enabled=False):
            state_TR = torch.zeros_like(u_TR) if previous_TR is None else previous_TR
            state_TR = torch.gru_cell(u_TR, state_TR, *(p.float() for p in self.gru.parameters()))
        logits_TE = self.up(state_TR, ctx)
        probs_TE = logits_TE.softmax(-1)
        experts_TK = top_k(logits_TE, self.k)
        weights_TK = renormalise(gather(probs_TE, experts_TK))
        return empty_padding(Routing(logits_TE, probs_TE, experts_TK, weights_TK, state=state_TR), ctx)
