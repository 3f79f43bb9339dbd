"""SMoE-Dropout: a random router that never learns, and a k that grows to all experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.routing.follow import Follow
from moesaic.routing.router import Router
from moesaic.routing.select import top_k
from moesaic.schedules.linear import Linear
from moesaic.schedules.schedule import Scheduled


@register("routing", "smoe_dropout", paper="2303.01610", card="routing.md#smoe-dropout", needs={"step"})
class SMoEDropout(Router):
    """l = x W^T + b, W and b as torch.nn.Linear starts them and frozen; top-k(t) of l, softmax over those k.

    `k` follows a schedule, by default linear from E / 2 to E over `steps` optimisation steps. Evaluation uses the k that
    training reached (the step is saved), or `eval_k`, the model's knob for speed. No gradient reaches W even if someone
    unfreezes it.
    """

    needs = frozenset({"step"})

    def __init__(self, dim: int, experts: int, k: Scheduled | None = None, steps: int = 10_000, eval_k: int | None = None):
        super().__init__(experts, experts)
        if eval_k is not None and not 1 <= eval_k <= experts:
            raise BadInput(f"eval_k={eval_k}: must be between 1 and {experts} experts")
        self.follow_k = Follow(Linear(max(1, experts // 2), experts, steps) if k is None else k, "k")
        self.follow_k.check(1, experts)
        self.needs = self.follow_k.needs
        self.eval_k = eval_k
        start = nn.Linear(dim, experts)
        self.weight = nn.Parameter(start.weight.detach(), requires_grad=False)
        self.offset_E = nn.Parameter(start.bias.detach(), requires_grad=False)

    def score(self, x_TD: Tensor, ctx: RoutingContext) -> Tensor:
        with torch.autocast(x_TD.device.type, enabled=False):
            return linear(x_TD.float(), self.weight.detach().float(), self.offset_E.detach().float())

    def select(self, logits_TE: Tensor, ctx: RoutingContext) -> Tensor:
        k = self.follow_k.whole(ctx) if ctx.training or self.eval_k is None else self.eval_k
        return top_k(logits_TE, k)

    def weigh(self, logits_TE: Tensor, experts_TK: Tensor, ctx: RoutingContext) -> Tensor:
        return logits_TE.gather(1, experts_TK).softmax(-1)
