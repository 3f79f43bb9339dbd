"""A router's number that follows a schedule: it reads the step while training, and remembers it for evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.schedules.schedule import Scheduled, as_schedule


class Follow(nn.Module):
    """`follow(ctx)` is the schedule's value now, a Python number.

    Training forwards read `ctx.step` (need: "step") and note it in the buffer `step`; evaluation reads the buffer, so a
    saved model evaluates where its training stood. The buffer is set, not advanced: recomputed forwards and several
    micro-batches of one step change nothing. A constant schedule asks for no step.
    """

    def __init__(self, value: Scheduled, option: str):
        super().__init__()
        self.schedule, self.option = as_schedule(value, option), option
        self.step: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"step"}) if self.schedule.moves else frozenset()

    def now(self, ctx: RoutingContext) -> int:
        """The step that counts: the host's in training, the last one trained in evaluation."""
        if not ctx.training:
            return int(self.step)
        step = int(ctx.need("step", f"a schedule of {self.option}"))
        self.step.fill_(step)
        return step

    def forward(self, ctx: RoutingContext) -> float:
        return self.schedule.value(self.now(ctx) if self.schedule.moves else 0, ctx.layer)

    def whole(self, ctx: RoutingContext) -> int:
        """The value rounded to an integer, half up."""
        return int(self(ctx) + 0.5)

    def check(self, low: float, high: float) -> None:
        """Raises BadInput when the schedule ever leaves [low, high]."""
        if not (low <= self.schedule.low and self.schedule.high <= high):
            seen = f"{self.schedule.low:g} to {self.schedule.high:g}" if self.schedule.moves else f"{self.schedule.low:g}"
            raise BadInput(f"{self.option}={seen}: must stay between {low:g} and {high:g}")
