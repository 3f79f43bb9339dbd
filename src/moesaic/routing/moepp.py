"""MoE++: a router that sees the previous layer's logits, over FFN and zero-computation experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moesaic.core.context import RoutingContext
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.capacity import apply_capacity
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.score import LinearScore
from moesaic.routing.select import top_k
from moesaic.routing.weigh import gather, renormalise


@register("routing", "moepp", paper="2410.07348", card="routing.md#moe++", needs={"previous"})
class MoEPlusPlus(Router):
    """G_j = R_j(x) + W_j G_{j-1}: gating residuals; the full G_j is the state that the next layer sees.

    Router rows are `ffn` FFN experts, then constants, one copy and one zero expert (the order of the
    `zero_computation` bank). Softmax, top-k; with `renormalise` (what the released weights run with) a chosen zero
    expert weighs 0 and the rest is divided by its sum; without it (the paper) weights are plain softmax values.
    `capacity_factor` gamma and `tau` bound FFN experts at gamma tau K T / (tau N_FFN + N_ZC) pairs and
    zero-computation ones at gamma K T / (tau N_FFN + N_ZC); later tokens' first choices then queue ahead of earlier tokens'
    second ones, so it is not for causal hosts unless k = 1.
    `cheap_bias` is added to the logits of zero-computation experts before the softmax, and kept in a buffer that may be
    moved: a retrofit starts it where they are never chosen. The next layer sees logits without it.
    """

    needs = frozenset({"previous"})
    bank = "zero_computation"

    def __init__(
        self,
        dim: int,
        experts: int,
        k: int = 2,
        zero_computation: int = 3,
        zeros: int = 1,
        renormalise: bool = True,
        capacity_factor: float | None = None,
        tau: float = 0.75,
        cheap_bias: float | None = None,
    ):
        super().__init__(experts, k)
        self.ffn, self.zeros, self.renormalise = experts - zero_computation, zeros, renormalise
        self.capacity_factor, self.tau = capacity_factor, tau
        self.causal = capacity_factor is None or k == 1
        self.score = LinearScore(dim, experts)
        self.residual_weight = nn.Parameter(torch.zeros(experts, experts))
        self.cheap_bias: Tensor | None
        self.register_buffer("cheap_bias", None if cheap_bias is None else torch.tensor(float(cheap_bias)))

    @property
    def cheap_E(self) -> Tensor:
        """True for zero-computation experts, bool [E]."""
        return torch.arange(self.num_experts, device=self.residual_weight.device) >= self.ffn

    def capacities_E(self, tokens: int, factor: float) -> Tensor:
        """Pairs each expert may take, float [E]; they sum to factor * K * T."""
        share = factor * self.k * tokens / (self.tau * self.ffn + self.num_experts - self.ffn)
        return torch.where(self.cheap_E, share, self.tau * share)

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        logits_TE = self.score(x_TD, ctx)
        previous_TE = ctx.need("previous", "moepp")
        if previous_TE is not None:
            with torch.autocast(x_TD.device.type, enabled=False):
                logits_TE = logits_TE + linear(previous_TE, self.residual_weight.float())
        sum_TE = logits_TE
        if self.cheap_bias is not None:
            logits_TE = logits_TE + self.cheap_bias * self.cheap_E
        probs_TE = logits_TE.softmax(-1)
        experts_TK = top_k(logits_TE, self.k)
        weights_TK = gather(probs_TE, experts_TK)
        if self.renormalise:
            is_zero_TK = experts_TK >= self.num_experts - self.zeros
            weights_TK = renormalise(weights_TK.masked_fill(is_zero_TK, 0.0))
        routing = empty_padding(Routing(logits_TE, probs_TE, experts_TK, weights_TK, state=sum_TE), ctx)
        if ctx.training and self.capacity_factor is not None:
            tokens = x_TD.shape[0] if ctx.mask is None else int(ctx.mask.sum())
            routing = apply_capacity(routing, self.capacities_E(tokens, self.capacity_factor).ceil().long())
        return routing
