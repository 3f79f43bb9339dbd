"""Warm-up, stable, decay."""

from __future__ import annotations

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.schedules.schedule import Schedule


@register("schedules", "wsd", paper="2404.06395", card="layers-and-balancing.md#sigma-moe-tiny")
class WarmupStableDecay(Schedule):
    """A line from `start` to `peak` over `warmup` steps, `peak` until `steps - decay`, a line to `end` at `steps`.

    The middle may be prolonged at will: only its length depends on `steps`.
    """

    def __init__(
        self, start: float = 0.0, peak: float = 1.0, end: float = 0.0, warmup: int = 100, decay: int = 200, steps: int = 1000
    ):
        if warmup < 0 or decay < 0 or warmup + decay > steps:
            raise BadInput(f"warmup={warmup} and decay={decay} do not fit into steps={steps}")
        self.start, self.peak, self.end = start, peak, end
        self.warmup, self.decay, self.steps = warmup, decay, steps

    def value(self, step: int, layer: int = 0) -> float:
        step = max(step, 0)
        if step < self.warmup:
            return self.start + (self.peak - self.start) * step / self.warmup
        left = self.steps - step
        if left >= self.decay:
            return self.peak
        return self.end + (self.peak - self.end) * max(left, 0) / self.decay

    @property
    def low(self) -> float:
        return min(self._ends)

    @property
    def high(self) -> float:
        return max(self._ends)

    @property
    def _ends(self) -> list[float]:
        return [self.peak, *([self.start] if self.warmup else []), *([self.end] if self.decay else [])]
