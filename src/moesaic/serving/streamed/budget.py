"""How a byte budget for experts is divided: slots that a policy fills, and staging slots that the rest streams through."""

from __future__ import annotations

import math
from typing import NamedTuple

from moesaic.core.errors import BadInput
from moesaic.core.sizes import parse_bytes, show_bytes

MOST_STAGING = 4
"""Experts in flight past the cache: one is computed while the others come in; more did not help two cores and one disk."""

STAGING_SHARE = 8
"""A staging slot more is worth having once the budget holds so many of them: the cache comes first."""


class Plan(NamedTuple):
    """Bytes that the policy may fill, and staging slots of each size of expert."""

    budget_bytes: int
    capacity_bytes: int
    staging: int


def budget_of(total_bytes: int, memory: int | str | None, resident: float | None) -> int:
    """Bytes of `memory` (an int, or text such as 6GiB), or of a `resident` share of all experts. Raises BadInput."""
    if (memory is None) == (resident is None):
        raise BadInput("give either a memory budget for experts or a resident share of them, not both and not neither")
    if resident is not None:
        if not (isinstance(resident, int | float) and math.isfinite(resident) and 0 < resident <= 1):
            raise BadInput(f"a resident share of {resident}: give a number above 0, at most 1")
        return math.ceil(resident * total_bytes)
    budget = parse_bytes(memory, "memory") if isinstance(memory, str) else int(memory or 0)
    if budget <= 0:
        raise BadInput(f"a memory budget of {memory}: give more than 0 bytes")
    return budget


def divide(budget_bytes: int, total_bytes: int, sizes: list[int]) -> Plan:
    """`sizes`: bytes of one expert of each size there is. Raises BadInput naming the minimum where not one of each fits."""
    if budget_bytes >= total_bytes:
        return Plan(total_bytes, total_bytes, 0)
    one = sum(sizes)
    if budget_bytes < one:
        raise BadInput(
            f"a budget of {show_bytes(budget_bytes)} is too small: one expert to stream through takes {show_bytes(one)} "
            f"({one} bytes), all experts take {show_bytes(total_bytes)}"
        )
    staging = max(1, min(MOST_STAGING, budget_bytes // (STAGING_SHARE * one)))
    return Plan(budget_bytes, budget_bytes - staging * one, staging)
