"""The streaming engine: at each layer's experts call it asks a cache policy, fetches what is missing, and computes in waves.

The policy is the object that `moesaic replay` simulates, driven by the same events in the same order, so its counts are
the replay's. Experts in use are pinned by it; what finds no place streams through staging slots, each expert read once per
layer and pass. Computing follows the order of experts, as far as they have arrived, whatever the policy decided: outputs
are bit for bit those of the resident model, unless a lossy mode was asked for.

One forward pass at a time: calls from several threads wait for each other, and a pass that another one interrupts is
computed right but counted as two.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.routing import Dispatch
from moesaic.kernels import few_rows
from moesaic.kernels.products import hit_spans
from moesaic.kernels.slots import bounds_of
from moesaic.serving.streamed import stats as C
from moesaic.serving.streamed.budget import MOST_STAGING, Plan
from moesaic.serving.streamed.layer import Layer
from moesaic.serving.streamed.lossy.mode import Lossy, keep_pairs
from moesaic.serving.streamed.prefetch import Prefetch, mean_scores
from moesaic.serving.streamed.stats import Stats
from moesaic.serving.streamed.wave import Wave
from moesaic.store import Reader, Slots
from moesaic.trace import calls
from moesaic.trace.hardware import Hardware
from moesaic.trace.policies import state as S
from moesaic.trace.policies.policy import Policy, Shape
from moesaic.view import View, tap
from moesaic.view.block import Block
from moesaic.view.implementation import STREAMED
from moesaic.view.skeleton.fetch import Fetch, fetch
from moesaic.view.skeleton.packed_sources import Sourced

GIVEN = frozenset({"history", "scores", "ahead"})
"""What a live engine can bring of what policies need; a policy that needs more only replays."""

NOBODY = np.zeros((0, 0), np.int64)
"""Of ids that coming routers would choose: none so far."""


class Owed(NamedTuple):
    """Experts of a layer that a lossy mode applies one layer later: to the very x that was routed to them."""

    layer: Layer
    x_TD: Tensor
    dispatch: Dispatch


class Engine:
    """Serves every experts call of a model from at most `plan.budget_bytes` of slots. Made by `load_streamed`.

    Args:
        prefetch_bytes: of guesses in one pass, where the policy guesses; None: what the experts of one token take.
        hardware: what the policy is told of the machine; no host that computes misses.
        lossy: a mode that changes the output, or None.
    """

    def __init__(
        self,
        view: View,
        sources: dict[tuple[int, int], Sourced],
        reader: Reader,
        policy: Policy,
        plan: Plan,
        shape: Shape,
        *,
        prefetch_bytes: int | None = None,
        hardware: Hardware | None = None,
        lossy: Lossy | None = None,
    ) -> None:
        self.policy, self.plan, self.shape, self.reader = policy, plan, shape, reader
        self.hardware, self.lossy = hardware, lossy
        self.layers = [Layer(i, block, [sources[i, 0], sources[i, 1]]) for i, block in enumerate(view)]
        self.prefetch = Prefetch(self, prefetch_bytes)
        self._lock, self._here = threading.RLock(), threading.local()
        self._seen: set[int] = set()
        self._new = self._fresh = True
        self._begin()
        self.clear()
        for layer in self.layers:
            setattr(layer.block.experts, STREAMED, _Call(self, layer))
        if lossy is not None:
            lossy.attach(self)
        signals = policy.needs & {"scores", "ahead"}
        if signals:
            for layer in self.layers:
                layer.block.on_choice(self._watcher(layer), scores="scores" in signals)
        self._watch = calls.watch_calls(view.model, self._before, lambda output: None)
        weakref.finalize(view.model, reader.close)

    @property
    def exact(self) -> bool:
        """Whether outputs are those of the resident model: under every policy, and not under a lossy mode."""
        return self.lossy is None or self.lossy.neutral

    @contextmanager
    def without_loss(self) -> Iterator[None]:
        """The lossy mode rests inside: exact routing, for this thread only."""
        before = getattr(self._here, "exact", False)
        self._here.exact = True
        try:
            yield
        finally:
            self._here.exact = before

    @property
    def mode(self) -> Lossy | None:
        """The lossy mode in force in this thread."""
        return None if getattr(self._here, "exact", False) else self.lossy

    @property
    def looking_ahead(self) -> bool:
        """Whether this thread asks coming routers now, which is no pass of the model."""
        return bool(getattr(self._here, "looking", False))

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

    def trim(self) -> None:
        """Where experts of one size made room for others', give the memory of free slots back, before it is used."""
        if len(self._slots) > 1 and self.held_bytes > self.plan.budget_bytes:
            for slots in self._slots.values():
                slots.trim()

    def close(self) -> None:
        """Stop reading. The model cannot run afterwards."""
        self._watch.remove()
        self.reader.close()

    def _begin(self) -> None:
        """An empty cache; also after a failed read, when nobody knows what the slots hold."""
        self.policy.start(self.shape, self.plan.capacity_bytes, self.hardware)
        against = reason_against(self.policy)
        if against is not None:
            raise BadInput(against)
        note = self.policy.state.note
        self.prefetch.forget()
        self._slots: dict[Any, Slots] = {}
        self._staging: dict[Any, list[int]] = {}
        for kind in dict.fromkeys(kind for layer in self.layers for kind in layer.kinds):
            mine = [layer for layer in self.layers if kind in layer.kinds]
            experts = [(layer, e) for layer in mine for e, k in enumerate(layer.kind_E) if layer.kinds[k] == kind]
            cached = min(len(experts), self.plan.capacity_bytes // min(layer.bytes_E[e] for layer, e in experts))
            staging = self.plan.staging
            if not note[S.ADMIT]:  # what is resident from the start is all that ever will be, and the rest streams through
                cached = sum(int(self.policy.resident(layer.number)[e]) for layer, e in experts)
                staging = staging or min(MOST_STAGING, len(experts) - cached)
            stack = all(few_rows.suits(layer.stand_in(), layer.dtype) for layer in mine)
            self._slots[kind] = slots = Slots(kind[:2], kind[2], cached + staging, stack)
            self._staging[kind] = [slots.take() for _ in range(staging)]
        for layer in self.layers:
            layer.use([self._slots[kind] for kind in layer.kinds])
        before = self.reader.counters.bytes
        for layer in self.layers:
            for e in np.flatnonzero(self.policy.resident(layer.number)[: layer.experts]).tolist():
                self._into(layer, e, self._take(layer, e)).wait()
        self._preloaded = self.reader.counters.bytes - before

    def _before(self, call: calls.Call) -> None:
        self._new, self._fresh = True, not call.continues

    def _watcher(self, layer: Layer) -> Any:
        def watch(choice: tap.Choice, block: Block) -> None:
            # by layer: who routes a coming layer meanwhile, as a recorder that looks ahead does, passes here too
            self._here.__dict__.setdefault("choices", {})[layer.number] = choice

        return watch

    def run(self, layer: Layer, x_TD: Tensor, dispatch: Dispatch, ids_TK: Tensor | None) -> Tensor:
        """The experts call of one layer: y [T, D]."""
        choice = self._here.__dict__.get("choices", {}).pop(layer.number, None)
        with self._lock:
            try:
                self._begin_pass(layer, x_TD.shape[0])
                before_TD = self._pay(layer, x_TD)
                dispatch, ids_TK = self._altered(layer, dispatch, ids_TK)
                wave = self._event(layer, x_TD.shape[0], dispatch, ids_TK, choice)
                dispatch = self._put_off(layer, x_TD, dispatch, wave)
                y_TD = layer.run(x_TD, dispatch, wave.parts)
                if wave.passing:  # used once, and given no place: guesses had to wait for theirs
                    for e in wave.passing:
                        layer.give(e)
                    self._guess(layer.number, choice)
                return y_TD if before_TD is None else y_TD + before_TD
            except BaseException:
                self.reader.forget()
                self._here.__dict__.pop("owed", None)
                self._begin()
                raise

    def _begin_pass(self, layer: Layer, tokens: int) -> None:
        if self._new or layer.number in self._seen:
            self.policy.begin_step(self._fresh, tokens > 1)
            self.prefetch.begin_pass()
            self._stats.passes += 1
            self._seen.clear()
            self._new = False
        self._seen.add(layer.number)

    def _altered(self, layer: Layer, dispatch: Dispatch, ids_TK: Tensor | None) -> tuple[Dispatch, Tensor | None]:
        """What the lossy mode leaves of the choice, and how much that is."""
        if self.mode is None:
            return dispatch, ids_TK
        true = dispatch.token_S.numel()
        absent_E = torch.from_numpy(~self.policy.resident(layer.number)[: layer.experts])
        changed = self.mode.choose(layer, dispatch, ids_TK, absent_E)
        self._stats.choices += true
        self._stats.choices_kept += true - changed.lost
        return changed.dispatch, changed.ids_TK

    def _put_off(self, layer: Layer, x_TD: Tensor, dispatch: Dispatch, wave: Wave) -> Dispatch:
        """Leave some of the missing experts to the next layer's call, where the lossy mode says so."""
        if self.mode is None:
            return dispatch
        missing = [e for e in (*wave.coming, *wave.queue) if e not in wave.passing]
        later = self.mode.put_off(layer, dispatch, missing)
        if not later:
            return dispatch
        now_S = torch.tensor([e not in later for e in range(layer.experts)])[dispatch.expert_S]
        self.prefetch.flying.update({(layer.number, e): fetch for e, fetch in wave.leave(later).items()})
        self._here.owed = Owed(layer, x_TD, keep_pairs(dispatch, ~now_S))
        self._stats.choices_kept -= int((~now_S).sum())
        self._stats.deferred += len(later)
        return keep_pairs(dispatch, now_S)

    def _pay(self, layer: Layer, x_TD: Tensor) -> Tensor | None:
        """What the layer before left to this one, y [T, D]."""
        owed: Owed | None = self._here.__dict__.pop("owed", None)
        if owed is None or owed.layer.number != layer.number - 1:  # that pass was cut short
            return None
        if owed.x_TD.shape[0] != x_TD.shape[0]:
            raise BadInput(f"{layer.block.name} sees other tokens than the layer before: experts cannot be deferred to it")
        experts = [e for e, _, _ in hit_spans(bounds_of(owed.dispatch))]
        late = {e: fetch for e in experts if (fetch := self.prefetch.flying.pop((owed.layer.number, e), None)) is not None}
        gone = {e for e in experts if e not in owed.layer.held}  # another thread's pass came between
        wave = Wave(self, owed.layer, [], gone, late)
        return owed.layer.run(owed.x_TD, owed.dispatch, wave.parts)

    def _event(self, layer: Layer, tokens: int, dispatch: Dispatch, ids_TK: Tensor | None, choice: tap.Choice | None) -> Wave:
        """One event of the policy for what a dispatch asks for."""
        return self.bring(layer, tokens, *by_demand(layer.experts, dispatch, ids_TK), choice)

    def bring(
        self, layer: Layer, tokens: int, experts: np.ndarray, counts: np.ndarray, choice: tap.Choice | None = None
    ) -> Wave:
        """One event: what the policy lets go leaves, what is missing is asked for, then what may be needed next."""
        self.prefetch.land()
        given: dict[str, Any] = {}
        if "scores" in self.policy.needs:
            given["scores_E"] = self._scores(layer, choice, experts, counts)
        if "ahead" in self.policy.needs:
            given["ahead_AM"] = NOBODY  # asked of the routers below, while reads are under way
        decision = self.policy.event(layer.number, experts, counts, step_tokens=tokens, **given)
        stats, act, found = self._stats, decision.action_n, decision.experts_n
        if decision.on_host_n.any():
            raise BadInput(f"policy {self.policy.entry.name} runs experts on a host: streaming from disk has no other device")
        stats.event(layer.number, act, len(decision.evicted_M2))
        for l, e in decision.evicted_M2.tolist():
            self.prefetch.release(self.layers[l], e)
        loads = sorted(found[act == S.LOAD].tolist())
        late = self.prefetch.used(layer, found[(act == S.HIT) | (act == S.LATE)].tolist())
        passing: list[int] = []
        if self.prefetch.active:  # guesses that were not wanted after all were turned back
            kept_E = self.policy.state.cell[S.RESIDENT, layer.number] != S.ABSENT
            passing = [e for e in found[(act == S.HIT) | (act == S.LATE)].tolist() if not kept_E[e]]
            for e in [e for e in layer.held if not kept_E[e] and e not in passing]:
                self.prefetch.release(layer, e)
        for e in loads:
            self._take(layer, e)
        self.trim()
        wave = Wave(self, layer, loads, set(found[act == S.STREAM].tolist()), late)
        wave.passing = passing
        if not passing:
            self._guess(layer.number, choice)
        return wave

    def _guess(self, layer: int, choice: tap.Choice | None) -> None:
        """Read ahead, while the layer's own experts come and compute."""
        if self.prefetch.active:
            self._here.looking = True
            try:
                self.prefetch.ask(layer, choice if "ahead" in self.policy.needs else None)
            finally:
                self._here.looking = False

    def _scores(self, layer: Layer, choice: tap.Choice | None, experts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The router's scores, mean over tokens; where it shows none, or the bank is run by hand, shares of the tokens."""
        logits_TE = None if choice is None else layer.block.logits(choice)
        if logits_TE is not None and logits_TE.shape[0]:
            return mean_scores(self.policy, logits_TE)
        share_E = np.zeros(layer.experts)
        share_E[experts] = counts / max(1, counts.sum())
        return share_E

    def _take(self, layer: Layer, e: int) -> int:
        try:
            return layer.take(e)
        except IndexError:
            self.prefetch.make_room()
            return layer.take(e)

    def _into(self, layer: Layer, e: int, slot: int, matrix: int | None = None, prefetch: bool = False) -> Fetch:
        which = (0, 1) if matrix is None else (matrix,)
        layer.inside[slot] = e
        return fetch(self.reader, e, [(layer.sources[m], layer.matrix(m, slot)) for m in which], prefetch)


class _Call:
    """What stands on an experts module: `implementation.STREAMED`."""

    def __init__(self, engine: Engine, layer: Layer) -> None:
        self.engine, self.layer = engine, layer

    def __call__(self, x_TD: Tensor, dispatch: Dispatch, ids_TK: Tensor | None) -> Tensor:
        return self.engine.run(self.layer, x_TD, dispatch, ids_TK)


def reason_against(policy: Policy) -> str | None:
    """Why a policy that was started cannot run live; None where it can."""
    note, name = policy.state.note, policy.entry.name
    if note[S.WHERE] == S.ON_CPU or (note[S.WHERE] in (S.CHEAPEST, S.MAKESPAN) and not note[S.MEASURED]):
        return f"policy {name} runs experts on a host: streaming from disk has no other device"
    if note[S.DENSE]:
        return f"policy {name} moves experts that nobody chose: only the replay does that"
    if note[S.SOURCE] in (S.TRUTH, S.PREDICTED):
        return f"policy {name} knows or predicts routing before its layer runs: only the replay brings that"
    return None


def by_demand(experts: int, dispatch: Dispatch, ids_TK: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Distinct experts and their tokens as the replay lays them out: most tokens first, ties by first appearance."""
    if ids_TK is None:
        spans = hit_spans(bounds_of(dispatch))
        return np.array([e for e, _, _ in spans], np.int64), np.array([end - start for _, start, end in spans], np.int64)
    flat = ids_TK.detach().reshape(-1).numpy()
    found, first, counts = np.unique(flat[(flat >= 0) & (flat < experts)], return_index=True, return_counts=True)
    order = np.lexsort((first, -counts)) if ids_TK.shape[0] > 1 else np.argsort(first)
    return found[order].astype(np.int64), counts[order].astype(np.int64)
