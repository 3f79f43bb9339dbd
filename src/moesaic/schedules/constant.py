"""One value, always."""

from __future__ import annotations

from moesaic.core.registry import register
from moesaic.schedules.schedule import Schedule


@register("schedules", "constant", card="layers-and-balancing.md#sigma-moe-tiny")
class Constant(Schedule):
    """`at` at every step and in every layer."""

    def __init__(self, at: float = 1.0):
        self.at = at

    def value(self, step: int, layer: int = 0) -> float:
        return self.at

    @property
    def low(self) -> float:
        return self.at

    @property
    def high(self) -> float:
        return self.at
