"""What a device tier did, counted as the replay counts it, and what a run says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moesaic.serving.streamed import stats as C

if TYPE_CHECKING:
    from moesaic.serving.streamed.device_tier import DeviceTier

HOSTS = C.COUNTS
"""Row of `count_CL` after those of `stats.Stats`: experts that the host computed where they lay."""


@dataclass
class DeviceStats:
    """Counts [., L] per layer, of distinct experts per layer and pass.

    Attributes:
        moved_bytes: copied to the device since counting began; `preloaded_bytes`: before the first pass, not among them.
        stall_seconds: that the host waited for copies. A GPU waits for them by itself, which no clock here sees.
    """

    count_CL: np.ndarray
    passes: int = 0
    moved_bytes: int = 0
    preloaded_bytes: int = 0
    stall_seconds: float = 0.0

    def event(self, layer: int, action_n: np.ndarray, on_host_n: np.ndarray, evicted: int) -> None:
        """Count one event's decision."""
        moved = C.Stats(self.count_CL)
        moved.event(layer, action_n[~on_host_n], evicted)
        self.count_CL[HOSTS, layer] += int(on_host_n.sum())
        self.count_CL[C.ACCESSES, layer] += int(on_host_n.sum())

    @property
    def hit_rate(self) -> float:
        """Share of accesses that found their expert on the device; 0 before the first."""
        return int(self.count_CL[C.HITS].sum()) / max(1, int(self.count_CL[C.ACCESSES].sum()))

    def row(self) -> dict[str, Any]:
        """As keys of a JSON object."""
        rows = {"accesses": C.ACCESSES, "hits": C.HITS, "loads": C.LOADS, "streamed": C.STREAMS, "host_runs": HOSTS}
        counts = {f"device_{name}": int(self.count_CL[row].sum()) for name, row in rows.items()}
        return {
            "device_hit_rate": self.hit_rate,
            **counts,
            "device_evictions": int(self.count_CL[C.EVICTIONS].sum()),
            "device_moved_bytes": self.moved_bytes,
            "device_preloaded_bytes": self.preloaded_bytes,
            "device_stall_seconds": self.stall_seconds,
        }


def device_facts(tier: DeviceTier) -> dict[str, Any]:
    """Keys of `moesaic run --json` where experts pass through a device."""
    return {
        **tier.stats.row(),
        "tier_device": tier.device.name,
        "device_policy": tier.policy.entry.name,
        "device_memory_bytes": tier.plan.budget_bytes,
        "device_capacity_bytes": tier.plan.capacity_bytes,
        "device_expert_bytes": tier.held_bytes,
        "device_hardware": tier.hardware.describe(),
    }
