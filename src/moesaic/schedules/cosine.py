"""Half a cosine: slow, fast, slow."""

from __future__ import annotations

import math

from moesaic.core.registry import register
from moesaic.schedules.schedule import Ramp


@register("schedules", "cosine", paper="2303.01610", card="routing.md#smoe-dropout")
class Cosine(Ramp):
    """end + (start - end) * (1 + cos(pi step / steps)) / 2."""

    def __init__(self, start: float = 0.0, end: float = 1.0, steps: int = 1000):
        super().__init__(start, end, steps)

    def at(self, share: float) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * share)) / 2
