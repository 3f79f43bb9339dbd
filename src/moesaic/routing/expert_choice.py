"""Expert Choice: experts pick their tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Pairs, Routing
from moesaic.routing.router import Router
from moesaic.routing.score import LinearScore, NoisyScore


@register("routing", "expert_choice", paper="2202.09368", card="routing.md#ec", causal=False)
class ExpertChoice(Router):
    """Each expert takes its C = max(1, n c / E) best of a pool of n tokens; a token may get 0 to E experts.

    The softmax is over experts, the top-k over tokens; weights are the raw softmax values. `pool`: "all" tokens of
    the call, each "sequence", or each "position" across the batch, the only causal one. Padding scores 0: it is
    taken only when real tokens run out, and then weighs 0.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        average: float = 2.0,
        pool: Literal["all", "sequence", "position"] = "all",
        noise: bool = False,
    ):
        super().__init__(experts, 0)
        if not 0 < average <= experts:
            raise BadInput(f"average={average} experts per token must be in (0, {experts}]")
        if pool not in ("all", "sequence", "position"):
            raise BadInput(f"pool={pool!r}: one of all, sequence, position")
        self.average, self.pool = average, pool
        self.causal = pool == "position"
        linear = LinearScore(dim, experts)
        self.score = NoisyScore(linear, "vmoe") if noise else linear

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        logits_TE = self.score(x_TD, ctx)
        probs_TE = logits_TE.softmax(-1)
        scores_TE = probs_TE if ctx.mask is None else probs_TE * ctx.mask.unsqueeze(1)
        picks = [self._pick(scores_TE, index_t) for index_t in self._pools(x_TD.shape[0], ctx, x_TD.device)]
        token_S, expert_S = (torch.cat(parts) for parts in zip(*picks, strict=True))
        return Routing(logits_TE, probs_TE, pairs=Pairs(token_S, expert_S, scores_TE[token_S, expert_S]))

    def _pick(self, scores_TE: Tensor, index_t: Tensor) -> tuple[Tensor, Tensor]:
        count = min(len(index_t), max(1, int(len(index_t) * self.average / self.num_experts)))
        best_tE = torch.sort(scores_TE[index_t].detach(), dim=0, descending=True, stable=True).indices[:count]
        expert_S = torch.arange(self.num_experts, device=index_t.device).repeat_interleave(count)
        return index_t[best_tE.T.reshape(-1)], expert_S

    def _pools(self, tokens: int, ctx: RoutingContext, device: torch.device) -> list[Tensor]:
        if self.pool == "all":
            return [torch.arange(tokens, device=device)]
        key_T = ctx.need("sequence_ids" if self.pool == "sequence" else "positions", "expert_choice")
        order_T = torch.sort(key_T, stable=True)
        counts = torch.unique_consecutive(order_T.values, return_counts=True)[1]
        return list(order_T.indices.split(counts.tolist()))
