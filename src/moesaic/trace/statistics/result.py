"""What every measure returns: a dataclass of arrays, which prints as JSON and sums itself up in a few numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from moesaic.core.errors import BadInput


@dataclass(frozen=True)
class Statistic:
    """Base of every result. A field's suffix names its axes (see rows.py); NaN means that there is nothing to measure."""

    def to_json(self) -> dict[str, Any]:
        """Every field, arrays as nested lists, NaN as None."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}

    def summary(self) -> dict[str, Any]:
        """The few numbers of the whole trace that the command prints as JSON, keys in snake_case with units."""
        return self.to_json()

    def by_layer(self) -> list[dict[str, Any]]:
        """The few numbers of each layer, or an empty list where the measure has none."""
        return []


class NotRecorded(BadInput):
    """The trace lacks the column that a measure reads."""


def plain(value: Any) -> Any:
    """As JSON knows it: NumPy's types become Python's, and what is not finite becomes None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def mean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Mean of what is not NaN; NaN where nothing is."""
    known = np.isfinite(values)
    count = known.sum(axis)
    total = np.where(known, values, 0).sum(axis)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)
