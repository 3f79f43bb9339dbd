"""Mixtral-offloading: LRU per layer, and the next router's first choices loaded into a few staging buffers.

Card serving-and-scale.md, "Mixtral-offloading: LRU, speculative gate, mixed quantisation"; quantisation is not here. A
speculative load takes an LRU entry's place only when it is used, so that a wrong one leaves the cache as it was.
"""

from __future__ import annotations

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.trace.policies import state as S
from moesaic.trace.policies.policy import Policy


@register(
    "policies", "mixtral_offloading", paper="2312.17238",
    card="serving-and-scale.md#mixtral-offloading-lru-speculative-gate-mixed-quantisation", needs={"ahead"},
)  # fmt: skip
class MixtralOffloading(Policy):
    """`speculate`: the next layer's first choices to load. `staging`: buffers for them, paid from the capacity where it has
    room for them and a slot in every layer."""

    rule = S.RECENCY
    source = S.AHEAD

    def __init__(self, speculate: int = 2, staging: int = 4) -> None:
        if speculate < 0 or staging < 0:
            raise BadInput(f"speculate {speculate}, staging {staging}: give 0 or more")
        self.speculate, self.staging = speculate, staging

    def slots(self) -> np.ndarray:
        size = int(self.shape.sizes_LE.max())
        wanted = min(self.staging, int(self.shape.experts_L.max())) * size if self.speculate else 0
        spare = self.capacity_bytes - int(self.shape.bytes_L.sum())
        # Everything resident leaves nothing to stage.
        everything = self.capacity_bytes >= self.shape.total_bytes
        self.staging_bytes = 0 if everything else max(0, min(wanted, spare // size * size))
        return self.split(self.capacity_bytes - self.staging_bytes)

    def setup(self) -> None:
        note = self.state.note
        note[S.STAGE], note[S.STAGE_ROOM] = 1, self.staging_bytes
        note[S.WIDTH] = self.speculate
        note[S.SOURCE] = S.AHEAD if self.speculate else S.NOTHING
