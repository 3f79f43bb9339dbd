"""Replay a trace through a cache policy: hits, bytes, stalls and tokens per second on a stated machine."""

from __future__ import annotations

import time as clock
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesaic.core import registry
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.trace import simulate as sim
from moesaic.trace.file import Trace
from moesaic.trace.hardware import Hardware
from moesaic.trace.order import Block, Order, apart, in_order, next_uses, read, wide
from moesaic.trace.policies import state as S
from moesaic.trace.policies.history import History
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


def history_of(
    trace: Trace, share: float, as_decode: bool = False, other: Trace | None = None, batch: int = 0
) -> tuple[History | None, np.ndarray | None]:
    """What policies may learn from, and the sequences left to replay (None: all).

    `other` trace, or a `share` of the sequences of this one; a share of 1 learns from the very routing that is
    replayed, and says so.
    """
    if other is not None:
        if [tuple(layer[:3]) for layer in other.layers] != [tuple(layer[:3]) for layer in trace.layers]:
            raise BadInput(f"{other.name} is of another model than {trace.name}: their layers differ")
        return History(other, in_order(other, as_decode, batch), other.name), None
    if share >= 1:
        return History(trace, in_order(trace, as_decode, batch), "the replayed routing itself", itself=True), None
    if share <= 0:
        return None, None
    first, rest = apart(trace, share)
    return History(trace, in_order(trace, as_decode, batch, first), f"{len(first)} sequences of the trace, not replayed"), rest


def _signals(trace: Trace, policy: Policy) -> None:
    """Raise MissingNeed where the trace lacks what the policy reads."""
    how = {"ahead": (trace.ahead_TLAM, "--lookahead 3"), "scores": (trace.logits_TLE, "--logits")}
    for need, (column, option) in how.items():
        if need in policy.needs and column is None:
            raise MissingNeed(
                f"policy {policy.entry.name} reads {need}, which {trace.name} lacks: record it with `moesaic trace … {option}`"
            )


def replay(
    trace: Trace,
    policy: str | Policy,
    capacity_bytes: int,
    hardware: Hardware | None = None,
    *,
    as_decode: bool = False,
    batch: int = 0,
    sequences: np.ndarray | None = None,
    history: History | None = None,
    expert_bytes: int | None = None,
    shape: Shape | None = None,
    resident_bytes: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Simulate `policy` (a registered name, or a built one) on `trace` with a cache of `capacity_bytes`.

    `as_decode`, `batch` and `sequences`: see `order.in_order`. `history`: what the policy learns from (`history_of`).
    `expert_bytes`, `resident_bytes`: other sizes than the trace's; `shape`: what a running engine caches, expert by expert.
    Raises MissingNeed where the policy needs what the trace or the history lacks.
    """
    built = registry.get("policies", policy).build() if isinstance(policy, str) else policy
    hardware = hardware or Hardware()
    shape = shape_of(trace, expert_bytes) if shape is None else shape
    _signals(trace, built)
    if history is not None and built.learns and built.history is not history:
        built.learn(history)
    chosen = built.arrange(trace, sequences, batch) if batch else sequences
    order = in_order(trace, as_decode, batch, chosen)
    if not order.steps:
        raise BadInput(f"{trace.name}: nothing is left to replay")
    built.start(shape, capacity_bytes, hardware)
    given = built.replayed(trace, order)
    if given.experts_TLK is not None:
        trace = Trace(trace.header, {**trace.columns, "experts": given.experts_TLK}, trace.path)
    run = _Run(trace, order, built, hardware, resident_bytes)
    preloaded = int(shape.sizes_LE[built.state.cell[S.RESIDENT] != S.ABSENT].sum())
    took = run.all(given.guess_TLM, given.demand_WL, progress)
    notes = list(given.notes)
    if built.learns and built.history is not None:
        notes.append(f"learnt from {built.history.label}")
    note = built.state.note
    return Result(
        built.entry.name, built.exact, int(capacity_bytes), min(1.0, capacity_bytes / shape.total_bytes), hardware,
        run.count_CL, run.time, run.mark, shape.bytes_L, int(note[S.SPENT]),
        int(note[S.WASTED] + run.unused()), preloaded, took, notes,
    )  # fmt: skip


class _Run:
    """The arrays of one replay, filled block by block."""

    def __init__(self, trace: Trace, order: Order, policy: Policy, hardware: Hardware, resident_bytes: int | None) -> None:
        self.trace, self.order, self.policy = trace, order, policy
        self.count_CL = np.zeros((sim.COUNTS, len(trace.layers)), np.int64)
        self.time, self.mark = np.zeros(sim.TIMES), np.zeros(sim.MARKS, np.int64)
        dense = trace.header.resident_bytes if resident_bytes is None else resident_bytes
        self.hw = hardware.array(dense / len(trace.layers))
        self.next_TLK = next_uses(trace, order) if "future" in policy.needs else np.zeros((0, 1, 1), np.int32)

    def all(self, guess_TLM: np.ndarray | None, demand_WL: np.ndarray | None, progress: Progress | None) -> float:
        """Replay every block; seconds that it took, without those of compiling at first use."""
        layers, slots = self.trace.experts_TLK.shape[1:]
        nothing = Block(
            np.zeros(0, np.int64), np.zeros((0, layers, slots), np.uint16), np.zeros(1, np.int64), np.zeros(0, bool), 0
        )
        self._drive(nothing, None, None, 0)
        before, done = clock.perf_counter(), 0
        for block in self.order.blocks(self.trace):
            self._drive(block, guess_TLM, demand_WL, done)
            done += int(block.starts_N1[block.steps])
            if progress:
                progress(done, len(self.order.rows_T))
        return clock.perf_counter() - before

    def _drive(self, block: Block, guess_TLM: np.ndarray | None, demand_WL: np.ndarray | None, done: int) -> None:
        trace, policy, rows = self.trace, self.policy, slice(done, done + len(block.rows_T))
        none_TLM, none_TLE = np.zeros((0, 1, 1), np.uint16), np.zeros((0, 1, 1), np.float32)
        logits_TLE = trace.logits_TLE if "scores" in policy.needs else None
        ahead_TLAM = trace.ahead_TLAM if policy.state.note[S.SOURCE] in (S.AHEAD, S.IMPACT) else None
        sim.drive(
            policy.state, policy.memory, self.hw, block.ids_TLK, block.starts_N1, block.fresh_N, block.steps,
            self.next_TLK[rows] if len(self.next_TLK) else self.next_TLK,
            none_TLE if logits_TLE is None else read(logits_TLE, block.rows_T).astype(np.float32),
            none_TLM[..., None] if ahead_TLAM is None else wide(read(ahead_TLAM, block.rows_T)),
            none_TLM if guess_TLM is None else guess_TLM[rows],
            np.zeros((0, 1)) if demand_WL is None else demand_WL,
            self.count_CL, self.time, self.mark,
        )  # fmt: skip

    def unused(self) -> int:
        """Bytes of guesses that nothing has used by the end."""
        c = self.policy.state
        left = int(c.cell[S.SIZE][c.cell[S.GUESS] > 0].sum())
        return left - int(self.mark[sim.FLIGHT_LEFT])
