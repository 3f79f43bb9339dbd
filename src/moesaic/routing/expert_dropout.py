"""Expert dropout: for an interval of training steps only some experts of each cluster can be chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.schedules.schedule import Scheduled, as_schedule


class ExpertDropout:
    """`dropout(ctx)` is the mask of survivors, bool [E] on the CPU, or None in evaluation, where all survive.

    Each of `clusters` groups of consecutive experts keeps max(1, floor((1 - rate) * size)) of its own, drawn anew every
    `interval` optimisation steps. The draw depends on (seed, layer, step // interval) alone: there is no counter that
    validation forwards or recomputation could advance, and a resumed run draws what it would have drawn. `rate` may follow
    a schedule (read at the interval's first step). MoEC's drop (routing.md, "MoEC"), for any router that masks its scores.
    """

    def __init__(self, experts: int, clusters: int = 1, rate: Scheduled = 0.5, interval: int = 250, seed: int = 0):
        self.rate = as_schedule(rate, "rate")
        if clusters < 1 or experts % clusters:
            raise BadInput(f"clusters={clusters} does not divide experts={experts}")
        if not (self.rate.low >= 0 and self.rate.high < 1):
            raise BadInput(f"rate={self.rate.low:g} to {self.rate.high:g}: a share in [0, 1)")
        if interval < 1:
            raise BadInput(f"interval={interval}: at least one step")
        self.experts, self.clusters, self.interval, self.seed = experts, clusters, interval, seed

    @property
    def active(self) -> bool:
        return self.rate.high > 0

    def __call__(self, ctx: RoutingContext) -> Tensor | None:
        if not ctx.training or not self.active:
            return None
        return self.survivors_E(int(ctx.need("step", "expert dropout")), ctx.layer)

    def survivors_E(self, step: int, layer: int = 0) -> Tensor:
        round_ = step // self.interval
        size = self.experts // self.clusters
        kept = max(1, int((1 - self.rate.value(round_ * self.interval, layer)) * size + 1e-9))
        generator = torch.Generator().manual_seed((self.seed * 1009 + layer) * 1_000_003 + round_)
        order_Ge = torch.rand(self.clusters, size, generator=generator).argsort(1)
        return (order_Ge.argsort(1) < kept).flatten()
