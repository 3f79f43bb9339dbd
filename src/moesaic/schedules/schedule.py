"""The schedule contract: `value(step, layer)`, a pure function, so that nothing about it needs saving but the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic.core import registry
from moesaic.core.errors import BadInput, MoesaicError


class Schedule:
    """A number that depends on the optimisation step (from 0) and, where a schedule says so, on the layer (from 0).

    Equal arguments give equal values: a resumed run, a recomputed forward and a validation pass read the same number.
    """

    def value(self, step: int, layer: int = 0) -> float:
        raise NotImplementedError

    @property
    def low(self) -> float:
        """The smallest value that is ever given."""
        raise NotImplementedError

    @property
    def high(self) -> float:
        """The largest value that is ever given."""
        raise NotImplementedError

    @property
    def moves(self) -> bool:
        """False when every step and every layer has the same value: such a schedule needs no step."""
        return self.low != self.high


class Ramp(Schedule):
    """From `start` to `end` over `steps` steps, then `end` for good; a subclass gives the path by `at(share)`."""

    def __init__(self, start: float, end: float, steps: int):
        if steps < 1:
            raise BadInput(f"steps={steps}: a ramp takes at least one step")
        self.start, self.end, self.steps = start, end, steps

    def at(self, share: float) -> float:
        """Value at a share of the way, 0 < share < 1."""
        raise NotImplementedError

    def value(self, step: int, layer: int = 0) -> float:
        if step <= 0:
            return self.start
        return self.end if step >= self.steps else self.at(step / self.steps)

    @property
    def low(self) -> float:
        return min(self.start, self.end)

    @property
    def high(self) -> float:
        return max(self.start, self.end)


Scheduled = float | int | Schedule | Mapping[str, Any]
"""What an option that may follow a schedule takes: a number, a Schedule, or {"schedule": NAME, **options} as in YAML."""


def as_schedule(value: Scheduled, option: str = "schedule") -> Schedule:
    """The schedule that an option's value means. Raises BadInput naming the option, and what is wrong with it."""
    from moesaic.schedules.constant import Constant

    if isinstance(value, Schedule):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Constant(value)
    if not isinstance(value, Mapping) or "schedule" not in value:
        raise BadInput(f"{option}={value!r}: give a number, a schedule, or a mapping such as schedule: linear, start: 8, ...")
    options = {key: item for key, item in value.items() if key != "schedule"}
    try:
        built = registry.get("schedules", str(value["schedule"])).build(**options)
    except (MoesaicError, TypeError) as error:
        raise BadInput(f"{option}: {error}") from error
    assert isinstance(built, Schedule)
    return built
