"""Fate: the next layers' routers on this layer's input say what to fetch; shallow layers stay whole, deep ones use ARC.

Card serving-and-scale.md, "Fate: next gate on this layer's input". Quantised copies are not here.
"""

from __future__ import annotations

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.trace.policies import state as S
from moesaic.trace.policies.allocation import split
from moesaic.trace.policies.policy import Policy


@register(
    "policies", "fate", paper="2502.12224", card="serving-and-scale.md#fate-next-gate-on-this-layers-input", needs={"ahead"},
)  # fmt: skip
class Fate(Policy):
    """`shallow`: layers whose experts all have a slot, as many of them as fit. `extra`: experts fetched beyond the slots of
    a token. `ahead`: layers looked ahead."""

    rule = S.ARC
    source = S.AHEAD

    def __init__(self, shallow: int = 3, extra: int = 0, ahead: int = 1) -> None:
        for name, value, least in (("shallow", shallow, 0), ("extra", extra, 0), ("ahead", ahead, 1)):
            if value < least:
                raise BadInput(f"{name} {value}: at least {least}")
        self.shallow, self.extra, self.ahead = shallow, extra, ahead

    def slots(self) -> np.ndarray:
        experts_L, bytes_L = self.shape.experts_L, self.shape.bytes_L
        if self.capacity_bytes >= self.shape.total_bytes:
            return experts_L.copy()
        left, slots_L = self.capacity_bytes, np.zeros(len(experts_L), np.int64)
        whole = 0
        while whole < min(self.shallow, len(experts_L)) and experts_L[whole] * bytes_L[whole] <= left:
            slots_L[whole] = experts_L[whole]
            left -= int(experts_L[whole] * bytes_L[whole])
            whole += 1
        if whole < len(experts_L):
            slots_L[whole:] = split(left, experts_L[whole:], bytes_L[whole:])
        return slots_L

    def setup(self) -> None:
        self.state.note[S.WIDTH] = self.shape.top_k + self.extra
        self.state.note[S.DEPTH] = self.ahead
