"""How many experts of each layer a cache holds: bytes split over layers in proportion to what each asks for."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from moesaic.trace.policies.loops import compiled

Method = Literal["largest_remainder", "highest_averages"]


@compiled
def _fill(slots_L, left, experts_L, bytes_L, demand_L):
    while True:
        best = -1
        value = -1.0
        for l in range(len(slots_L)):
            if slots_L[l] < experts_L[l] and bytes_L[l] <= left and demand_L[l] / (slots_L[l] + 1) > value:
                best, value = l, demand_L[l] / (slots_L[l] + 1)
        if best < 0:
            return
        slots_L[best] += 1
        left -= bytes_L[best]


@compiled
def highest_averages(capacity, experts_L, bytes_L, demand_L):
    """Slots of each layer: one after another to the layer whose demand per slot is largest, ties to the lower layer."""
    slots_L = np.zeros(len(experts_L), np.int64)
    _fill(slots_L, capacity, experts_L, bytes_L, demand_L)
    return slots_L


def split(
    capacity_bytes: int, experts_L: Any, bytes_L: Any, demand_L: Any = None, method: Method = "largest_remainder"
) -> np.ndarray:
    """Slots of each layer: never more than it has experts, never more bytes than the capacity. Ties go to the lower layer.

    `demand_L`: what to be proportional to, in slots (default: the layer's experts). With experts of one size, all slots
    that fit are given out, as far as layers have experts for them. ExpertFlow's own example, demands 3 and 2 for 4 slots
    giving 3 and 1, is that of `highest_averages`; the largest remainder gives 2 and 2.
    """
    experts_L, bytes_L = np.asarray(experts_L, np.int64), np.asarray(bytes_L, np.int64)
    demand_L = np.asarray(experts_L if demand_L is None else demand_L, np.float64)
    if capacity_bytes >= int((experts_L * bytes_L).sum()):
        return experts_L.copy()
    demand_L = np.where(demand_L > 0, demand_L, 1e-9)
    if method == "highest_averages":
        return highest_averages(int(capacity_bytes), experts_L, bytes_L, demand_L)
    ideal_L = capacity_bytes * demand_L / (demand_L * bytes_L).sum()
    slots_L = np.minimum(np.floor(ideal_L + 1e-9).astype(np.int64), experts_L)
    left = int(capacity_bytes) - int((slots_L * bytes_L).sum())
    for layer in np.lexsort((np.arange(len(ideal_L)), -np.round(ideal_L - slots_L, 9))):
        if slots_L[layer] < experts_L[layer] and bytes_L[layer] <= left:
            slots_L[layer] += 1
            left -= int(bytes_L[layer])
    _fill(slots_L, left, experts_L, bytes_L, demand_L)
    return slots_L
