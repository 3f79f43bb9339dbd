"""What a streamed model did: hits, bytes and waiting, counted as the replay of a trace counts them."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

ACCESSES, HITS, LOADS, STREAMS, LATES, EVICTIONS, COUNTS = range(7)


@dataclass
class Stats:
    """Counts [., L] per layer. An access is a distinct expert that one layer used in one forward pass.

    Attributes:
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
        }


def peak_bytes() -> int:
    """The most memory that this process has had resident, in bytes, Python and libraries included."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:  # getrusage would count the process that started us
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
