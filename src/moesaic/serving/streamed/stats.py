"""What a streamed model did: hits, bytes and waiting, counted as the replay of a trace counts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moesaic.trace.policies import state as S

ACCESSES, HITS, LOADS, STREAMS, LATES, EVICTIONS, COUNTS = range(7)


@dataclass
class Stats:
    """Counts [., L] per layer. An access is a distinct expert that one layer used in one forward pass.

    Attributes:
        prefetched_bytes: asked for ahead of need; of them used, and read in vain. `prefetch_failed`: reads that failed.
        choices: (token, expert) pairs that routers chose under a lossy mode; `choices_kept`: those that ran, in their own
            layer. `deferred`: experts applied one layer later.
        stall_seconds: spent waiting for bytes inside forward passes.
        read_bytes: read from disk since counting began; `preloaded_bytes`: before the first pass, not among them.
        read_seconds, reads: what the reader's threads took for them together.
    """

    count_CL: np.ndarray
    passes: int = 0
    stall_seconds: float = 0.0
    read_bytes: int = 0
    preloaded_bytes: int = 0
    read_seconds: float = 0.0
    reads: int = 0
    prefetched_bytes: int = 0
    prefetch_used_bytes: int = 0
    prefetch_wasted_bytes: int = 0
    prefetch_failed: int = 0
    choices: int = 0
    choices_kept: int = 0
    deferred: int = 0

    def event(self, layer: int, action_n: np.ndarray, evicted: int) -> None:
        """Count one event's decision."""
        self.count_CL[ACCESSES, layer] += len(action_n)
        self.count_CL[EVICTIONS, layer] += evicted
        for row, action in ((HITS, S.HIT), (LOADS, S.LOAD), (STREAMS, S.STREAM), (LATES, S.LATE)):
            self.count_CL[row, layer] += int((action_n == action).sum())

    def evicted(self, layer: int) -> None:
        """An expert left for one that is fetched ahead."""
        self.count_CL[EVICTIONS, layer] += 1

    @property
    def overlap(self) -> float | None:
        """Share of the routers' choices that ran, in their own layer; None without a lossy mode."""
        return self.choices_kept / self.choices if self.choices else None

    @property
    def accesses(self) -> int:
        return int(self.count_CL[ACCESSES].sum())

    @property
    def hits(self) -> int:
        return int(self.count_CL[HITS].sum())

    @property
    def hit_rate(self) -> float:
        """Share of accesses that found their expert in memory; 0 before the first."""
        return self.hits / max(1, self.accesses)

    def row(self) -> dict[str, Any]:
        """As keys of a JSON object."""
        counts = {name: int(self.count_CL[i].sum()) for i, name in enumerate(("accesses", "hits", "loads", "streamed", "late"))}
        return {
            "hit_rate": self.hit_rate,
            **counts,
            "evictions": int(self.count_CL[EVICTIONS].sum()),
            "passes": self.passes,
            "read_bytes": self.read_bytes,
            "preloaded_bytes": self.preloaded_bytes,
            "stall_seconds": self.stall_seconds,
            "read_seconds": self.read_seconds,
            "prefetched_bytes": self.prefetched_bytes,
            "prefetch_used_bytes": self.prefetch_used_bytes,
            "prefetch_wasted_bytes": self.prefetch_wasted_bytes,
            "prefetch_failed": self.prefetch_failed,
        }
