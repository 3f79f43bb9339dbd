"""A straight line, then its end: SMoE-Dropout's growing k."""

from __future__ import annotations

from moesaic.core.registry import register
from moesaic.schedules.schedule import Ramp


@register("schedules", "linear", paper="2303.01610", card="routing.md#smoe-dropout")
class Linear(Ramp):
    """start + (end - start) * step / steps, clipped at both ends."""

    def __init__(self, start: float = 0.0, end: float = 1.0, steps: int = 1000):
        super().__init__(start, end, steps)

    def at(self, share: float) -> float:
        return self.start + (self.end - self.start) * share
