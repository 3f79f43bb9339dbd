"""A constant ratio per step: EvoMoE's temperature, COMET's tau (log-linear)."""

from __future__ import annotations

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.schedules.schedule import Ramp


@register("schedules", "exponential", paper="2112.14397", card="routing.md#evomoe")
class Exponential(Ramp):
    """start * (end / start)^(step / steps): a straight line on a logarithmic axis. Both ends must be positive."""

    def __init__(self, start: float = 1.0, end: float = 0.5, steps: int = 1000):
        if start <= 0 or end <= 0:
            raise BadInput(f"start={start}, end={end}: an exponential schedule needs two positive ends")
        super().__init__(start, end, steps)

    def at(self, share: float) -> float:
        return float(self.start * (self.end / self.start) ** share)
