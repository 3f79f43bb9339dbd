"""Stairs: a value from each of a few steps on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.schedules.schedule import Schedule


@register("schedules", "steps", paper="2303.01610", card="routing.md#smoe-dropout")
class Steps(Schedule):
    """values[i] from step at[i - 1] until step at[i]: one more value than switches."""

    def __init__(self, values: Sequence[float] = (1.0, 2.0), at: Sequence[int] = (1000,)):
        if len(values) != len(at) + 1:
            raise BadInput(f"{len(at)} switches (at) lie between {len(at) + 1} values; got {len(values)} values")
        if list(at) != sorted(set(at)):
            raise BadInput(f"at={list(at)}: the switches must rise")
        self.values, self.at = list(values), list(at)

    def value(self, step: int, layer: int = 0) -> float:
        return self.values[bisect_right(self.at, step)]

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)
