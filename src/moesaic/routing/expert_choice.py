"""Expert Choice: experts pick their tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Pairs, Routing
from moesaic.routing.pools import Pool, check_pool, pools
from moesaic.routing.router import Router
from moesaic.routing.score import LinearScore, NoisyScore
from moesaic.routing.transport import capped_plan


@register("routing", "expert_choice", paper="2202.09368", card="routing.md#ec", causal=False)
class ExpertChoice(Router):
    """Each expert takes its C = max(1, n c / E) best of a pool of n tokens; a token may get 0 to E experts.

    The softmax is over experts, the top-k over tokens; weights are the raw softmax values. `pool`: "all" tokens of
    the call, each "sequence", or each "position" across the batch, the only causal one. Padding scores 0: it is
    taken only when real tokens run out, and then weighs 0. `cap` bounds the experts per token: the C best are then those
    of an entropic plan under that cap (`smooth` its entropy, `sweeps` of Dykstra's projections), while the weights stay
    softmax values. The plan keeps the cap; taking its C largest may pass it among near ties, where the plan is fractional.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        average: float = 2.0,
        pool: Pool = "all",
        noise: bool = False,
        cap: int | None = None,
        smooth: float = 1e-3,
        sweeps: int = 100,
    ):
        super().__init__(experts, 0)
        if not 0 < average <= experts:
            raise BadInput(f"average={average} experts per token must be in (0, {experts}]")
        if cap is not None and cap < average:
            raise BadInput(f"cap={cap} experts per token is below the average of {average}")
        if smooth <= 0 or sweeps < 1:
            raise BadInput(f"smooth={smooth}, sweeps={sweeps}: both must be positive")
        check_pool(pool)
        self.average, self.pool, self.cap, self.smooth, self.sweeps = average, pool, cap, smooth, sweeps
        self.causal = pool == "position"
        if self.causal:
            self.no_cache = "it pools one position of all sequences, which padding in front brings to different steps"
        linear = LinearScore(dim, experts)
        self.score = NoisyScore(linear, "vmoe") if noise else linear

    @property
    def sweep_flops(self) -> float:
        """Per entry and sweep of the capped plan: two log-sum-exps, two corrections, two clamps. 0 without a cap."""
        return 0.0 if self.cap is None else 12.0 * self.sweeps * self.num_experts

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        logits_TE = self.score(x_TD, ctx)
        probs_TE = logits_TE.softmax(-1)
        scores_TE = probs_TE if ctx.mask is None else probs_TE * ctx.mask.unsqueeze(1)
        found = pools(self.pool, x_TD.shape[0], ctx, "expert_choice", x_TD.device)
        picks = [self._pick(scores_TE, index_t) for index_t in found]
        token_S, expert_S = (torch.cat(parts) for parts in zip(*picks, strict=True))
        return Routing(logits_TE, probs_TE, pairs=Pairs(token_S, expert_S, scores_TE[token_S, expert_S]))

    def _pick(self, scores_TE: Tensor, index_t: Tensor) -> tuple[Tensor, Tensor]:
        count = min(len(index_t), max(1, int(len(index_t) * self.average / self.num_experts)))
        score_tE = scores_TE[index_t].detach()
        if self.cap is not None and count < len(index_t) and count * self.num_experts <= self.cap * len(index_t):
            score_tE = capped_plan(score_tE.T, count, self.cap, self.smooth, self.sweeps).T
        best_tE = torch.sort(score_tE, dim=0, descending=True, stable=True).indices[:count]
        expert_S = torch.arange(self.num_experts, device=index_t.device).repeat_interleave(count)
        return index_t[best_tE.T.reshape(-1)], expert_S
