"""From the results of cells to one row per method, and what can be said of two rows beyond the spread of seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

MEASURES = (
    "bits_per_byte", "valid_loss", "max_vio", "load_cv", "idle_experts", "experts_per_token", "changed", "flops_per_token",
    "parameters", "tokens_per_cpu_second", "memory_mb",
)  # fmt: skip
CERTAIN = 2.5
"""Standard errors by which two means must differ before anything is said of them: the pooled spread has few degrees of freedom,
and many differences are looked at."""


def rows(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per cell name, in order of appearance: means over seeds, `sd` of each measure where there are several."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        found.setdefault(result["name"], []).append(result)
    return [_row(name, cells) for name, cells in found.items()]


def _row(name: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    done = [cell["results"] for cell in cells if cell["status"] == "done"]
    row: dict[str, Any] = {
        "name": name,
        "group": cells[0]["group"],
        "seeds": len(done),
        "fitted": next((cell["fitted"] for cell in cells if cell.get("fitted") is not None), None),
        "errors": [cell["error"] for cell in cells if cell["status"] == "failed"],
        "sd": {},
    }
    for measure in MEASURES:
        values = [one[measure] for one in done if one.get(measure) is not None]
        row[measure] = statistics.fmean(values) if values else None
        if len(values) > 1:
            row["sd"][measure] = statistics.stdev(values)
    return row


def noise(table: list[dict[str, Any]], measure: str, masked: bool = False) -> float | None:
    """Standard deviation between seeds, pooled over the rows that have several; None when none has.

    Masked models (the group of that name) have their own: what they predict is another thing.
    """
    alike = [row for row in table if (row["group"] == "masked") == masked]
    weighed = [(row["seeds"] - 1, row["sd"][measure]) for row in alike if measure in row["sd"]]
    freedom = sum(weight for weight, _ in weighed)
    return math.sqrt(sum(weight * sd * sd for weight, sd in weighed) / freedom) if freedom else None


def difference(table: list[dict[str, Any]], one: str, other: str, measure: str = "bits_per_byte") -> dict[str, Any] | None:
    """`one` minus `other`, its standard error by the pooled noise, and the sign of it: -1, 1, or 0 for "cannot be told".

    None where a row is missing or has not the measure. Without any row of several seeds nothing can be told.
    """
    by_name = {row["name"]: row for row in table}
    a, b = by_name.get(one), by_name.get(other)
    if a is None or b is None or a[measure] is None or b[measure] is None:
        return None
    sd = noise(table, measure, a["group"] == "masked")
    gap = a[measure] - b[measure]
    error = None if sd is None else sd * math.sqrt(1 / a["seeds"] + 1 / b["seeds"])
    sign = 0 if error is None or abs(gap) <= CERTAIN * error else int(math.copysign(1, gap))
    return {"gap": gap, "error": error, "sign": sign}


def closest(table: list[dict[str, Any]], reference: str, count: int, groups: Iterable[str]) -> list[str]:
    """Names of the `count` rows of these groups whose bits per byte are nearest to those of `reference`."""
    by_name = {row["name"]: row for row in table}
    if reference not in by_name or by_name[reference]["bits_per_byte"] is None:
        return []
    goal = by_name[reference]["bits_per_byte"]
    near = [
        row for row in table if row["group"] in set(groups) and row["bits_per_byte"] is not None and row["name"] != reference
    ]
    return [row["name"] for row in sorted(near, key=lambda row: abs(row["bits_per_byte"] - goal))[:count]]
