"""Replay a trace through a cache policy: hits, bytes, stalls and tokens per second on a stated machine."""

from __future__ import annotations

import time as clock
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesaic.core import registry
from moesaic.core.errors import BadInput
from moesaic.trace import simulate as sim
from moesaic.trace.file import Trace
from moesaic.trace.hardware import Hardware
from moesaic.trace.order import in_order, next_uses
from moesaic.trace.policies import state as S
from moesaic.trace.policies.policy import Policy, Shape


@dataclass
class Result:
    """What a replay measured. Bytes per token and rates follow from the counts; seconds are the time model's."""

    policy: str
    exact: bool
    cache_bytes: int
    cache_share: float
    hardware: Hardware
    count_CL: np.ndarray
    time: np.ndarray
    mark: np.ndarray
    bytes_L: np.ndarray
    used_bytes: int
    wasted_bytes: int
    preloaded_bytes: int
    simulated_seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def count(self) -> np.ndarray:
        return self.count_CL.sum(1)

    @property
    def accesses(self) -> int:
        """Distinct experts of all events."""
        return int(self.count[sim.ACCESSES])

    @property
    def hits(self) -> int:
        return int(self.count[sim.HITS])

    @property
    def moved_bytes(self) -> int:
        """Bytes over the link, demanded and prefetched; what was resident before the first pass is `preloaded_bytes`."""
        return int(self.count[sim.DEMANDED] + self.count[sim.FETCHED])

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.accesses)

    @property
    def hit_rate_L(self) -> np.ndarray:
        return self.count_CL[sim.HITS] / np.maximum(1, self.count_CL[sim.ACCESSES])

    @property
    def seconds(self) -> float:
        return float(self.time[sim.SECONDS])

    def row(self) -> dict[str, Any]:
        """As a row of `moesaic replay --json`."""
        n, count, tokens = max(1, self.accesses), self.count, max(1, int(self.mark[sim.TOKENS]))
        decoded, choices = int(self.mark[sim.DECODE_TOKENS]), int(count[sim.CHOICES])
        return {
            "policy": self.policy,
            "exact": self.exact,
            "cache_bytes": self.cache_bytes,
            "cache_share": self.cache_share,
            "hit_rate": self.hit_rate,
            "strict_hit_rate": (self.hits - int(count[sim.FIRST_HITS])) / n,
            "warm_hit_rate": (self.hits + int(count[sim.WARM])) / n,
            "hit_rate_per_layer": [round(float(rate), 6) for rate in self.hit_rate_L],
            "moved_bytes": self.moved_bytes,
            "moved_bytes_per_token": self.moved_bytes / tokens,
            "demand_bytes": int(count[sim.DEMANDED]),
            "speculative_bytes_used": self.used_bytes,
            "speculative_bytes_wasted": self.wasted_bytes,
            "preloaded_bytes": self.preloaded_bytes,
            "host_runs": int(count[sim.HOSTS]),
            "streamed": int(count[sim.STREAMS]),
            "late": int(count[sim.LATES]),
            "evictions": int(count[sim.EVICTIONS]),
            "stall_seconds": float(self.time[sim.STALL]),
            "seconds": self.seconds,
            "tokens_per_second": int(self.mark[sim.TOKENS]) / self.seconds if self.seconds else 0.0,
            "decode_tokens_per_second": decoded / float(self.time[sim.DECODE]) if self.time[sim.DECODE] else None,
            "bound_tokens_per_second": self.bound,
            "simulation_seconds": self.simulated_seconds,
            "choices": choices,
            "choices_per_second": choices / self.simulated_seconds if self.simulated_seconds else 0.0,
            "notes": self.notes,
        }

    @property
    def bound(self) -> float | None:
        """Tokens per second that the link allows at this many moved bytes, whatever overlaps; None where none move."""
        if not self.moved_bytes:
            return None
        return int(self.mark[sim.TOKENS]) * self.hardware.link_bytes_per_second / self.moved_bytes


Progress = Callable[[int, int], None]


def shape_of(trace: Trace, expert_bytes: int | None = None) -> Shape:
    """What a trace's model asks a cache to hold. `expert_bytes`: pretend that every expert has this size."""
    bytes_L = trace.bytes_L if expert_bytes is None else np.full(len(trace.layers), expert_bytes, np.int64)
    if (bytes_L <= 0).any():
        name = trace.layers[int(np.argmin(bytes_L))].name
        raise BadInput(f"{trace.name} does not say how large an expert of {name} is: give --expert-bytes")
    return Shape(trace.experts_L, bytes_L, trace.top_k)


def replay(
    trace: Trace,
    policy: str | Policy,
    capacity_bytes: int,
    hardware: Hardware | None = None,
    *,
    as_decode: bool = False,
    expert_bytes: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Simulate `policy` (a registered name, or a built one) on `trace` with a cache of `capacity_bytes`.

    `as_decode`: one token per pass, sequence by sequence, whatever was recorded. Raises BadInput where the policy needs
    what the trace lacks.
    """
    built = registry.get("policies", policy).build() if isinstance(policy, str) else policy
    entry = built.entry
    hardware = hardware or Hardware()
    shape = shape_of(trace, expert_bytes)
    order = in_order(trace, as_decode)
    built.start(shape, capacity_bytes, hardware)
    c, m = built.state, built.memory
    preloaded = int((shape.bytes_L * c.layer[S.FILLED]).sum())
    futures = next_uses(trace, order) if "future" in entry.needs else np.zeros((0, 1, 1), np.int32)
    count_CL = np.zeros((sim.COUNTS, len(trace.layers)), np.int64)
    time, mark = np.zeros(sim.TIMES), np.zeros(sim.MARKS, np.int64)
    dense = trace.header.resident_bytes / len(trace.layers)
    hw = hardware.array(dense)
    before = clock.perf_counter()
    done = 0
    for block in order.blocks(trace):
        rows = slice(done, done + len(block.rows_T))
        future = futures[rows] if len(futures) else futures
        sim.drive(c, m, hw, block.ids_TLK, block.starts_N1, block.fresh_N, block.steps, future, count_CL, time, mark)
        done += int(block.starts_N1[block.steps])
        if progress:
            progress(done, len(trace))
    took = clock.perf_counter() - before
    return Result(
        entry.name, entry.exact, int(capacity_bytes), min(1.0, capacity_bytes / max(1, shape.total_bytes)), hardware, count_CL,
        time, mark, shape.bytes_L, int(c.note[S.SPENT]), int(c.note[S.WASTED]), preloaded, took,
    )  # fmt: skip
