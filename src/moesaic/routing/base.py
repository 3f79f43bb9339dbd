"""BASE layers: a balanced assignment of tokens to experts in training, the best expert in evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.core.context import RoutingContext
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.pools import Pool, check_pool, real_pools
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.score import LinearScore
from moesaic.routing.select import top_k
from moesaic.routing.transport import balanced_assignment


@register("routing", "base", paper="2103.16716", card="routing.md#scot", causal=False)
class Base(Router):
    """Training: every expert gets T / E tokens, the assignment that maximises the sum of x . c_e, by auction.

    Evaluation: argmax. The weight is sigma(x . c_e), through which alone the centroids learn; they start orthogonal with
    gain 0.1. BASE mixes sigma * F(x) + (1 - sigma) x with experts F(x) = x + f(x): that is x + sigma * f(x), which is
    what the bank's f, this weight and the host's residual give. `precision` bounds what the auction may lose per token,
    as a share of the spread of scores.
    """

    def __init__(self, dim: int, experts: int, pool: Pool = "all", precision: float = 0.01):
        super().__init__(experts, 1)
        check_pool(pool)
        self.pool, self.precision = pool, precision
        self.causal = pool == "position"
        self.score = LinearScore(dim, experts)
        nn.init.orthogonal_(self.score.weight, gain=0.1)

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        logits_TE = self.score(x_TD, ctx)
        experts_T1 = self._assign(logits_TE.detach(), ctx) if ctx.training else top_k(logits_TE, 1)
        weights_T1 = logits_TE.gather(1, experts_T1).sigmoid()
        return empty_padding(Routing(logits_TE, logits_TE.softmax(-1), experts_T1, weights_T1), ctx)

    def _assign(self, scores_TE: Tensor, ctx: RoutingContext) -> Tensor:
        expert_T = torch.zeros(scores_TE.shape[0], dtype=torch.long, device=scores_TE.device)
        for index_t in real_pools(self.pool, scores_TE.shape[0], ctx, "base", scores_TE.device):
            expert_T[index_t] = balanced_assignment(scores_TE[index_t], self.precision)
        return expert_T.unsqueeze(1)
