"""Top-k gating and all its conventions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.capacity import Policy, apply_capacity, capacity
from moesaic.routing.follow import Follow
from moesaic.routing.router import Router
from moesaic.routing.score import LinearScore, NoisyScore
from moesaic.routing.select import check_groups, keep_best_groups, top_k
from moesaic.routing.weigh import gather, renormalise
from moesaic.schedules.schedule import Scheduled, as_schedule

Convention = Literal["softmax", "renormalised", "topk_softmax", "sigmoid"]


@register("routing", "topk", paper="1701.06538", card="routing.md#topk")
class TopK(Router):
    """A linear map scores experts; the k best run; their outputs are mixed with score-derived weights.

    `convention`: "softmax" (a) w = p[idx]; "renormalised" (b) w = p[idx] / sum; "topk_softmax" (c) softmax(l[idx]);
    "sigmoid" (d) select by sigmoid(l) + bias, w = scale * s / sum s: the sigmoid gate of DeepSeek-V3, a baseline of its
    own. `k` is a number or a schedule of step and layer, such as progressive_sparsification. `groups` and `keep_groups`
    (e) restrict the choice to the best groups, scored by their "max" or "top2". `bias_E` is moved by a bias controller
    (see balancing/bias.py), enters the selection only, and gets no gradient. `capacity_factor` drops what overflows
    (`eval_capacity_factor` in evaluation; None keeps everything). Causal only for k = 1 then, and by "position": with more
    choices, later tokens' first ones queue ahead of earlier tokens' second ones.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        k: Scheduled = 2,
        convention: Convention = "renormalised",
        scale: float = 1.0,
        groups: int = 1,
        keep_groups: int | None = None,
        group_score: Literal["max", "top2"] = "max",
        jitter: float = 0.0,
        noise: Literal["shazeer", "vmoe"] | None = None,
        noise_std: float = 1.0,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        overflow: Policy = "position",
    ):
        schedule = as_schedule(k, "k")
        super().__init__(experts, int(schedule.high))
        keep = groups if keep_groups is None else keep_groups
        check_groups(experts, self.k, groups, keep)
        self.follow_k: Follow | None = None
        if schedule.moves:
            self.follow_k = Follow(schedule, "k")
            self.follow_k.check(1, experts)
            self.needs = self.needs | self.follow_k.needs
        if convention not in ("softmax", "renormalised", "topk_softmax", "sigmoid"):
            raise BadInput(f"convention={convention!r}: one of softmax, renormalised, topk_softmax, sigmoid")
        self.convention, self.scale = convention, scale
        self.groups, self.keep_groups, self.group_score = groups, keep, group_score
        self.capacity_factor, self.eval_capacity_factor, self.overflow = capacity_factor, eval_capacity_factor, overflow
        limited = capacity_factor is not None or eval_capacity_factor is not None
        self.causal = not limited or (overflow == "position" and self.k == 1)
        if eval_capacity_factor is not None:
            self.no_cache = "its capacity in evaluation follows from the number of tokens in the call"
        linear = LinearScore(dim, experts, jitter=jitter)
        self.score = NoisyScore(linear, noise, noise_std) if noise else linear
        self.bias_E: Tensor
        self.register_buffer("bias_E", torch.zeros(experts))

    def probs(self, logits_TE: Tensor, ctx: RoutingContext) -> Tensor:
        if self.convention != "sigmoid":
            return logits_TE.softmax(-1)
        return renormalise(logits_TE.sigmoid())

    def select(self, logits_TE: Tensor, ctx: RoutingContext) -> Tensor:
        base_TE = logits_TE.sigmoid() if self.convention == "sigmoid" else logits_TE.softmax(-1)
        scores_TE = base_TE + self.bias_E
        if self.keep_groups < self.groups:
            scores_TE = keep_best_groups(scores_TE, self.groups, self.keep_groups, self.group_score)
        return top_k(scores_TE, self.k_now(ctx))

    def as_top_k(self) -> tuple[Tensor, bool] | None:
        linear = self.score.score if isinstance(self.score, NoisyScore) else self.score
        plain = self.convention != "sigmoid" and self.scale == 1 and self.keep_groups == self.groups
        if not plain or self.follow_k is not None or self.eval_capacity_factor is not None or bool(self.bias_E.any()):
            return None
        assert isinstance(linear, LinearScore)
        return linear.weight, self.convention != "softmax"

    def k_now(self, ctx: RoutingContext) -> int:
        """Experts per token at this step and in this layer; `k` is their maximum."""
        return self.k if self.follow_k is None else self.follow_k.whole(ctx)

    def weigh(self, logits_TE: Tensor, experts_TK: Tensor, ctx: RoutingContext) -> Tensor:
        if self.convention == "topk_softmax":
            return self.scale * logits_TE.gather(1, experts_TK).softmax(-1)
        values_TE = logits_TE.sigmoid() if self.convention == "sigmoid" else logits_TE.softmax(-1)
        weights_TK = gather(values_TE, experts_TK)
        return self.scale * (weights_TK if self.convention == "softmax" else renormalise(weights_TK))

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        routing = super().forward(x_TD, ctx)
        if isinstance(self.score, NoisyScore) and ctx.training:
            routing = routing.replace(aux={**routing.aux, "noise_scale": torch.as_tensor(self.score.scale(x_TD))})
        return self.limit(routing, ctx)

    def limit(self, routing: Routing, ctx: RoutingContext) -> Routing:
        """Drop what overflows the capacity of this mode."""
        factor = self.capacity_factor if ctx.training else self.eval_capacity_factor
        if factor is None:
            return routing
        tokens = routing.tokens if ctx.mask is None else int(ctx.mask.sum())
        return apply_capacity(routing, capacity(tokens, self.k_now(ctx), self.num_experts, factor), self.overflow)
