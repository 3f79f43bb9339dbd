"""The streaming engine: at each layer's experts call it asks a cache policy, fetches what is missing, and computes in waves.

The policy is the object that `moesaic replay` simulates, driven by the same events in the same order, so its counts are
the replay's. Experts in use are pinned by it; what finds no place streams through staging slots, each expert read once per
layer and pass. Computing follows the order of experts, as far as they have arrived, whatever the policy decided: outputs
are bit for bit those of the resident model.

One forward pass at a time: calls from several threads wait for each other, and a pass that another one interrupts is
computed right but counted as two.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.routing import Dispatch
from moesaic.kernels import few_rows, waves
from moesaic.kernels.products import Span, hit_spans
from moesaic.kernels.slots import bounds_of
from moesaic.serving.streamed import stats as C
from moesaic.serving.streamed.budget import MOST_STAGING, Plan
from moesaic.serving.streamed.fetch import Fetch, fetch
from moesaic.serving.streamed.layer import Layer
from moesaic.serving.streamed.sources import Source
from moesaic.serving.streamed.stats import Stats
from moesaic.store import Reader, Slots
from moesaic.trace import calls
from moesaic.trace.policies import state as S
from moesaic.trace.policies.policy import Policy, Shape
from moesaic.view import View
from moesaic.view.implementation import STREAMED

AHEAD, AHEAD_ASIDE = 8, 2
"""Experts asked for before the first has come; fewer where each is read aside first, which takes memory of its own."""


class Engine:
    """Serves every experts call of a model from at most `plan.budget_bytes` of slots. Made by `load_streamed`."""

    def __init__(
        self, view: View, sources: dict[tuple[int, int], Source], reader: Reader, policy: Policy, plan: Plan, shape: Shape
    ) -> None:
        self.policy, self.plan, self.shape, self.reader = policy, plan, shape, reader
        self.layers = [Layer(i, block, [sources[i, 0], sources[i, 1]]) for i, block in enumerate(view)]
        self._lock = threading.RLock()
        self._seen: set[int] = set()
        self._new = self._fresh = True
        self._begin()
        self.clear()
        for layer in self.layers:
            setattr(layer.block.experts, STREAMED, _Call(self, layer))
        self._watch = calls.watch_calls(view.model, self._before, lambda output: None)
        weakref.finalize(view.model, reader.close)

    @property
    def exact(self) -> bool:
        """Outputs are those of the resident model under every policy: routing is never changed here."""
        return True

    @property
    def held_bytes(self) -> int:
        """Memory behind all slots in use so far."""
        return sum(slots.touched_bytes for slots in self._slots.values())

    def clear(self) -> None:
        """Count from here on; what is resident stays."""
        self._stats = Stats(np.zeros((C.COUNTS, len(self.layers)), np.int64))
        self._from = (self.reader.counters.bytes, self.reader.counters.reads, self.reader.counters.seconds)

    @property
    def stats(self) -> Stats:
        """What was done since `clear`, or since loading."""
        made, counters = self._stats, self.reader.counters
        made.read_bytes, made.reads = counters.bytes - self._from[0], counters.reads - self._from[1]
        made.read_seconds, made.preloaded_bytes = counters.seconds - self._from[2], self._preloaded
        return made

    def close(self) -> None:
        """Stop reading. The model cannot run afterwards."""
        self._watch.remove()
        self.reader.close()

    def _begin(self) -> None:
        """An empty cache; also after a failed read, when nobody knows what the slots hold."""
        self.policy.start(self.shape, self.plan.capacity_bytes)
        note = self.policy.state.note
        if note[S.WHERE] != S.MOVE and note[S.WHERE] != S.CHEAPEST:
            raise BadInput(f"policy {self.policy.entry.name} runs experts on a host: streaming from disk has no other device")
        if note[S.DENSE]:
            raise BadInput(f"policy {self.policy.entry.name} moves experts that nobody chose: only the replay does that")
        self._slots: dict[Any, Slots] = {}
        self._staging: dict[Any, list[int]] = {}
        for kind in dict.fromkeys(layer.kind for layer in self.layers):
            mine = [layer for layer in self.layers if layer.kind == kind]
            experts = sum(layer.experts for layer in mine)
            cached = min(experts, self.plan.capacity_bytes // min(layer.bytes for layer in mine))
            staging = self.plan.staging
            if not note[S.ADMIT]:  # what is resident from the start is all that ever will be, and the rest streams through
                cached = sum(int(self.policy.resident(layer.number).sum()) for layer in mine)
                staging = staging or min(MOST_STAGING, experts - cached)
            stack = all(few_rows.suits(layer.stand_in(), layer.dtype) for layer in mine)
            self._slots[kind] = slots = Slots(kind[:2], kind[2], cached + staging, stack)
            self._staging[kind] = [slots.take() for _ in range(staging)]
            for layer in mine:
                layer.use(slots)
        before = self.reader.counters.bytes
        for layer in self.layers:
            for e in np.flatnonzero(self.policy.resident(layer.number)[: layer.experts]).tolist():
                self._into(layer, e, self._take(layer, e)).wait()
        self._preloaded = self.reader.counters.bytes - before

    def _before(self, call: calls.Call) -> None:
        self._new, self._fresh = True, not call.continues

    def run(self, layer: Layer, x_TD: Tensor, dispatch: Dispatch, ids_TK: Tensor | None) -> Tensor:
        """The experts call of one layer: y [T, D]."""
        with self._lock:
            try:
                wave = self._event(layer, x_TD.shape[0], dispatch, ids_TK)
                return waves.run(x_TD, dispatch, layer.weights, wave.parts, layer.matrix)
            except BaseException:
                self.reader.forget()
                self._begin()
                raise

    def _event(self, layer: Layer, tokens: int, dispatch: Dispatch, ids_TK: Tensor | None) -> _Wave:
        if self._new or layer.number in self._seen:
            self.policy.begin_step(self._fresh, tokens > 1)
            self._stats.passes += 1
            self._seen.clear()
            self._new = False
        self._seen.add(layer.number)
        experts, counts = by_demand(layer.experts, dispatch, ids_TK)
        decision = self.policy.event(layer.number, experts, counts, step_tokens=tokens)
        count_CL, act = self._stats.count_CL, decision.action_n
        count_CL[C.ACCESSES, layer.number] += len(experts)
        count_CL[C.EVICTIONS, layer.number] += len(decision.evicted_M2)
        for row, action in ((C.HITS, S.HIT), (C.LOADS, S.LOAD), (C.STREAMS, S.STREAM), (C.LATES, S.LATE)):
            count_CL[row, layer.number] += int((act == action).sum())
        for l, e in decision.evicted_M2.tolist():
            self._give(self.layers[l], e)
        loads = sorted(decision.experts_n[act == S.LOAD].tolist())
        for e in loads:
            self._take(layer, e)
        if len(self._slots) > 1 and self.held_bytes > self.plan.budget_bytes:  # experts of one size made room for others'
            for slots in self._slots.values():
                slots.trim()
        return _Wave(self, layer, loads, set(decision.experts_n[act == S.STREAM].tolist()))

    def _take(self, layer: Layer, e: int) -> int:
        layer.held[e] = slot = layer.slots.take()
        return slot

    def _give(self, layer: Layer, e: int) -> None:
        layer.slots.give(layer.held.pop(e))

    def _into(self, layer: Layer, e: int, slot: int, matrix: int | None = None) -> Fetch:
        which = (0, 1) if matrix is None else (matrix,)
        layer.inside[slot] = e
        return fetch(self.reader, e, [(layer.sources[m], layer.matrix(m, slot)) for m in which])


class _Call:
    """What stands on an experts module: `implementation.STREAMED`."""

    def __init__(self, engine: Engine, layer: Layer) -> None:
        self.engine, self.layer = engine, layer

    def __call__(self, x_TD: Tensor, dispatch: Dispatch, ids_TK: Tensor | None) -> Tensor:
        return self.engine.run(self.layer, x_TD, dispatch, ids_TK)


class _Wave:
    """One experts call under way: what it loads into the cache, and what streams through the staging slots."""

    def __init__(self, engine: Engine, layer: Layer, loads: list[int], streamed: set[int]) -> None:
        self.engine, self.layer, self.streamed = engine, layer, streamed
        self.free = engine._staging[layer.kind]
        self.ahead = AHEAD_ASIDE if layer.aside else AHEAD
        self.queue, self.coming = deque(loads), dict[int, Fetch]()
        self._ask()

    def _ask(self) -> None:
        """Keep some loads in flight, in the order in which they will be computed."""
        while self.queue and len(self.coming) < self.ahead:
            e = self.queue.popleft()
            self.coming[e] = self.engine._into(self.layer, e, self.layer.held[e])

    def _arrived(self, e: int, fetched: Fetch) -> None:
        self.engine._stats.stall_seconds += fetched.wait()
        self.coming.pop(e, None)

    def parts(self, spans: list[Span], matrix: int | None) -> Iterator[list[Span]]:
        """See kernels/waves.py: the longest run of spans that is here, at least one, until all were given."""
        queue = deque(e for e, _, _ in spans if e in self.streamed)
        staged: dict[int, tuple[int, Fetch]] = {}
        at = 0
        while at < len(spans):
            part: list[Span] = []
            while at < len(spans):
                self._ask()
                while queue and self.free and len(staged) < self.ahead:
                    e, slot = queue.popleft(), self.free.pop()
                    staged[e] = slot, self.engine._into(self.layer, e, slot, matrix)
                e, start, end = spans[at]
                if e in self.streamed and e not in staged:
                    break  # this part holds every staging slot: compute it first
                fetched = staged[e][1] if e in staged else self.coming.get(e)
                if fetched is not None:
                    if part and not fetched.done:
                        break  # compute what is here while it comes
                    self._arrived(e, fetched)
                part.append((staged[e][0] if e in staged else self.layer.held[e], start, end))
                at += 1
            assert part, f"{self.layer.block.name}: no room to stream through"
            yield part
            used = {slot for slot, _, _ in part}
            for e in [e for e, (slot, _) in staged.items() if slot in used]:
                self.free.append(staged.pop(e)[0])


def by_demand(experts: int, dispatch: Dispatch, ids_TK: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Distinct experts and their tokens as the replay lays them out: most tokens first, ties by first appearance."""
    if ids_TK is None:
        spans = hit_spans(bounds_of(dispatch))
        return np.array([e for e, _, _ in spans], np.int64), np.array([end - start for _, start, end in spans], np.int64)
    flat = ids_TK.detach().reshape(-1).numpy()
    found, first, counts = np.unique(flat[(flat >= 0) & (flat < experts)], return_index=True, return_counts=True)
    order = np.lexsort((first, -counts)) if ids_TK.shape[0] > 1 else np.argsort(first)
    return found[order].astype(np.int64), counts[order].astype(np.int64)
