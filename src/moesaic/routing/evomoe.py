"""EvoMoE's dense-to-sparse gate: a Gumbel softmax whose temperature falls from all experts to one."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.follow import Follow
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.score import LinearScore
from moesaic.routing.select import top_k
from moesaic.schedules.linear import Linear
from moesaic.schedules.schedule import Scheduled


@register("routing", "evomoe", paper="2112.14397", card="routing.md#evomoe", needs={"step"})
class EvoMoE(Router):
    """Training: g = softmax((l + Gumbel) / tau(t)); experts with g > threshold run, from step `hard_after` only the argmax.

    Weights are softmax(l) on the active experts, not renormalised (released default), or g itself (`gumbel_weights`). The
    hard stage has no straight-through gradient for its choice. Evaluation: the argmax of l, no noise, weight softmax(l).
    tau is by default linear from 1.0 to 0.5 over `steps`, as released. The released threshold of 0.001 would not be dense
    for a thousand experts: the default is min(0.001, 0.064 / E). The first phases, one shared expert and its spawning,
    are the bank's (experts/spawn.py).
    """

    needs = frozenset({"step"})

    def __init__(
        self,
        dim: int,
        experts: int,
        tau: Scheduled | None = None,
        steps: int = 10_000,
        hard_after: int | None = None,
        threshold: float | None = None,
        gumbel_weights: bool = False,
    ):
        super().__init__(experts, experts)
        self.tau = Follow(Linear(1.0, 0.5, steps) if tau is None else tau, "tau")
        self.tau.check(1e-6, float("inf"))
        self.needs = self.tau.needs if hard_after is None else frozenset({"step"})
        self.threshold = min(1e-3, 0.064 / experts) if threshold is None else threshold
        if not 0 <= self.threshold < 1 / experts:
            raise BadInput(f"threshold={threshold}: must be in [0, 1 / {experts}), or no expert may pass it")
        self.hard_after, self.gumbel_weights = hard_after, gumbel_weights
        self.score = LinearScore(dim, experts)

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        logits_TE = self.score(x_TD, ctx)
        probs_TE = logits_TE.softmax(-1)
        if not ctx.training:
            best_T1 = top_k(logits_TE, 1)
            return empty_padding(Routing(logits_TE, probs_TE, best_T1, probs_TE.gather(1, best_T1)), ctx)
        uniform_TE = torch.rand(logits_TE.shape, generator=ctx.generator, device=logits_TE.device)
        gumbel_TE = -(-uniform_TE.clamp(min=1e-20).log()).clamp(min=1e-20).log()
        gate_TE = ((logits_TE + gumbel_TE) / self.tau(ctx)).softmax(-1)
        weight_TE = gate_TE if self.gumbel_weights else probs_TE
        if self.hard_after is not None and self.tau.now(ctx) >= self.hard_after:
            experts_TK = top_k(gate_TE, 1)
        else:
            experts_E = torch.arange(self.num_experts, device=x_TD.device)
            experts_TK = experts_E.expand_as(gate_TE).masked_fill(gate_TE.detach() <= self.threshold, -1)
        weights_TK = weight_TE.gather(1, experts_TK.clamp(min=0)).masked_fill(experts_TK < 0, 0.0)
        return empty_padding(Routing(logits_TE, probs_TE, experts_TK, weights_TK), ctx)
