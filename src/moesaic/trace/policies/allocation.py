"""How many experts of each layer a cache holds: bytes split over layers in proportion to what each asks for."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

Method = Literal["largest_remainder", "highest_averages"]


def split(
    capacity_bytes: int, experts_L: Any, bytes_L: Any, demand_L: Any = None, method: Method = "largest_remainder"
) -> np.ndarray:
    """Slots of each layer: never more than it has experts, never more bytes than the capacity. Ties go to the lower layer.

    `demand_L`: what to be proportional to, in slots (default: the layer's experts). With experts of one size, all slots
    that fit are given out, as far as layers have experts for them.
    """
    experts_L, bytes_L = np.asarray(experts_L, np.int64), np.asarray(bytes_L, np.int64)
    demand_L = np.asarray(experts_L if demand_L is None else demand_L, np.float64)
    if capacity_bytes >= int((experts_L * bytes_L).sum()):
        return experts_L.copy()
    slots_L = np.zeros(len(experts_L), np.int64)
    if not bytes_L.all():
        return slots_L
    demand_L = np.where(demand_L > 0, demand_L, 1e-9)
    left = int(capacity_bytes)
    if method == "largest_remainder":
        ideal_L = capacity_bytes * demand_L / (demand_L * bytes_L).sum()
        slots_L = np.minimum(np.floor(ideal_L + 1e-9).astype(np.int64), experts_L)
        left -= int((slots_L * bytes_L).sum())
        for layer in np.lexsort((np.arange(len(ideal_L)), -np.round(ideal_L - slots_L, 9))):
            if slots_L[layer] < experts_L[layer] and bytes_L[layer] <= left:
                slots_L[layer] += 1
                left -= int(bytes_L[layer])
    while True:
        open_L = (slots_L < experts_L) & (bytes_L <= left)
        if not open_L.any():
            return slots_L
        layer = int(np.argmax(np.where(open_L, demand_L / (slots_L + 1), -1)))
        slots_L[layer] += 1
        left -= int(bytes_L[layer])
