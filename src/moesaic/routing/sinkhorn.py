"""Sinkhorn routing: the best experts of a balanced entropic plan in training, of the softmax in evaluation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.pools import Pool, check_pool, real_pools
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.score import LinearScore
from moesaic.routing.select import top_k
from moesaic.routing.transport import sinkhorn
from moesaic.routing.weigh import gather


@register("routing", "sinkhorn", paper="2209.15466", card="routing.md#scot", causal=False)
class Sinkhorn(Router):
    """P = Sinkhorn(l / epsilon), rows 1, columns T / E, over the logits of a pool; a token takes its k largest of P.

    The released baseline solves on logits, not on softmax values as SCOT does. Weights are the plain softmax values, or
    the plan's (`combine="plan"`, through which gradient flows). Evaluation is greedy: with one token a plan says nothing.
    No loss is needed. The pool of training leaks the future; only "position" (across the batch) is causal.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        k: int = 1,
        epsilon: float = 1.0,
        iterations: int = 20,
        combine: Literal["softmax", "plan"] = "softmax",
        pool: Pool = "all",
    ):
        super().__init__(experts, k)
        check_pool(pool)
        if epsilon <= 0 or iterations < 1 or combine not in ("softmax", "plan"):
            raise BadInput(f"epsilon={epsilon}, iterations={iterations}, combine={combine!r}: > 0, >= 1, softmax or plan")
        self.epsilon, self.iterations, self.combine, self.pool = epsilon, iterations, combine, pool
        self.causal = pool == "position"
        self.score = LinearScore(dim, experts)

    def flops_per_token(self, length: int = 1) -> float:
        """Two products of the [T, E] kernel with a vector per iteration beside the linear map."""
        return super().flops_per_token() + 4.0 * self.iterations * self.num_experts

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        logits_TE = self.score(x_TD, ctx)
        probs_TE = logits_TE.softmax(-1)
        plan_TE = probs_TE
        if ctx.training:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.combine == "plan"):
                plan_TE = self._plan(logits_TE, ctx)
        experts_TK = top_k(plan_TE, self.k)
        weights_TK = gather(plan_TE if self.combine == "plan" else probs_TE, experts_TK)
        return empty_padding(Routing(logits_TE, probs_TE, experts_TK, weights_TK), ctx)

    def _plan(self, logits_TE: Tensor, ctx: RoutingContext) -> Tensor:
        plan_TE = torch.zeros_like(logits_TE)
        for index_t in real_pools(self.pool, logits_TE.shape[0], ctx, "sinkhorn", logits_TE.device):
            plan_TE = plan_TE.index_copy(0, index_t, sinkhorn(logits_TE[index_t], self.epsilon, self.iterations))
        return plan_TE
