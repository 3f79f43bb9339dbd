"""SCOT: transport plans of which every token (or every expert) keeps at most k entries."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Pairs, Routing
from moesaic.routing.pools import Pool, check_pool, real_pools
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.score import LinearScore
from moesaic.routing.select import top_k
from moesaic.routing.transport import sparse_plan
from moesaic.routing.weigh import gather


@register("routing", "scot", paper="2209.15466", card="routing.md#scot", causal=False)
class Scot(Router):
    """S = softmax(x W^T); P maximises <P, S> - gamma / 2 |P|^2 under marginals, with k-sparse columns.

    `choose="tokens"`: each token spreads 1 over at most k experts, which aim at T / E each; its nonzero entries are its
    experts (fewer than k where the projection says so). `choose="experts"`: each expert spreads T / E over at most
    C = ceil(k T / E) tokens, which aim at 1 each. The plan selects; weights are S, or the plan with `combine="plan"`.
    The official router feeds softmax values here and logits to its Sinkhorn baseline; both are kept so. A pool of
    one token has no plan to make: it takes the k best of S.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        k: int = 2,
        choose: Literal["tokens", "experts"] = "tokens",
        combine: Literal["softmax", "plan"] = "softmax",
        gamma: float = 1.0,
        steps: int = 20,
        rate: float = 0.01,
        pool: Pool = "all",
    ):
        super().__init__(experts, k)
        check_pool(pool)
        if k < 1 or gamma <= 0 or steps < 0:
            raise BadInput(f"k={k}, gamma={gamma}, steps={steps}: k must be at least 1, gamma positive, steps not negative")
        if choose not in ("tokens", "experts") or combine not in ("softmax", "plan"):
            raise BadInput(f"choose={choose!r}, combine={combine!r}: tokens or experts, softmax or plan")
        self.choose, self.combine, self.pool = choose, combine, pool
        self.gamma, self.steps, self.rate = gamma, steps, rate
        self.causal = pool == "position"
        if self.causal:
            self.no_cache = "it pools one position of all sequences, which padding in front brings to different steps"
        self.score = LinearScore(dim, experts)

    @property
    def sweep_flops(self) -> float:
        """Per entry and step: a comparison for each halving of the sort, the projection and the update."""
        return (self.steps + 1) * self.num_experts * (6.0 + max(1.0, math.log2(self.num_experts)))

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        logits_TE = self.score(x_TD, ctx)
        probs_TE = logits_TE.softmax(-1)
        pools = real_pools(self.pool, x_TD.shape[0], ctx, "scot", x_TD.device)
        plan_TE = torch.zeros_like(probs_TE)
        for index_t in pools:
            plan_TE = plan_TE.index_copy(0, index_t, self._plan(probs_TE[index_t]))
        weight_TE = plan_TE if self.combine == "plan" else probs_TE
        if self.choose == "tokens":
            experts_TK = top_k(plan_TE, self.k)
            experts_TK = experts_TK.masked_fill(plan_TE.gather(1, experts_TK) <= 0, -1)
            return empty_padding(Routing(logits_TE, probs_TE, experts_TK, gather(weight_TE, experts_TK)), ctx)
        token_S, expert_S = torch.nonzero(plan_TE > 0, as_tuple=True)
        return Routing(logits_TE, probs_TE, pairs=Pairs(token_S, expert_S, weight_TE[token_S, expert_S]))

    def _plan(self, probs_tE: Tensor) -> Tensor:
        """Plan of one pool [t, E], with gradient through its last projection when it weighs."""
        tokens, experts = probs_tE.shape
        if tokens == 1:
            kept_1K = top_k(probs_tE, self.k)
            return torch.zeros_like(probs_tE).scatter(1, kept_1K, probs_tE.gather(1, kept_1K))
        gains, mass, k = (probs_tE, 1.0, self.k) if self.choose == "tokens" else (probs_tE.T, tokens / experts, 0)
        k = k or min(tokens, math.ceil(self.k * tokens / experts))
        target = torch.full((gains.shape[1],), gains.shape[0] * mass / gains.shape[1], device=gains.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.combine == "plan"):
            plan = sparse_plan(gains, target, mass, k, self.gamma, self.steps, self.rate)
        return plan if self.choose == "tokens" else plan.T
