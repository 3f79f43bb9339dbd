"""Split a number of experts (or ranks, or bits) over layers in proportion to weights: exactly, and never past a limit."""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.core.errors import BadInput


def apportion(total: int, weights: Sequence[float], limits: Sequence[int]) -> list[int]:
    """Whole numbers that sum to `total`, proportional to `weights` by largest remainder; ties go to the lower layer.

    What a full layer cannot take goes to the others. Raises BadInput where the limits together are less than the total.
    """
    if total > sum(limits):
        raise BadInput(f"budget: {total} to give away, but the layers take {sum(limits)} at most")
    given = [0] * len(weights)
    left = total
    while left:
        open_ = [i for i, limit in enumerate(limits) if given[i] < limit]
        weight = sum(weights[i] for i in open_)
        ideal = {i: left * (weights[i] / weight if weight > 0 else 1 / len(open_)) for i in open_}
        part = {i: min(int(ideal[i] + 1e-9), limits[i] - given[i]) for i in open_}
        rest = left - sum(part.values())
        if all(part[i] < limits[i] - given[i] or part[i] + 1 > ideal[i] for i in open_):
            for i in sorted(open_, key=lambda i: (-(ideal[i] - part[i]), i)):
                if rest and given[i] + part[i] < limits[i]:
                    part[i] += 1
                    rest -= 1
        for i, number in part.items():
            given[i] += number
        left = rest
    return given
