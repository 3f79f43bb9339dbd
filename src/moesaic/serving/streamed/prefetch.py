"""Reads ahead of need: what the policy believes in is fetched while nothing that was demanded waits for the disk.

A guess waits behind every demanded read, is taken back when it is no longer wanted, never takes the place of what this
pass used (the policy sees to that), and cannot fail a request: one that does not arrive is a miss, later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moesaic.serving.streamed.layer import Layer
from moesaic.store import ReadFailed
from moesaic.trace.lookahead import look_ahead
from moesaic.trace.policies import state as S
from moesaic.trace.policies.policy import Policy
from moesaic.trace.simulate import want
from moesaic.view.skeleton.fetch import Fetch
from moesaic.view.tap import Choice

if TYPE_CHECKING:
    from moesaic.serving.streamed.engine import Engine

Place = tuple[int, int]
"""(layer, expert)"""


class Prefetch:
    """What is on its way into slots before it is needed, and what becomes of it.

    Attributes:
        flying: reads under way: guesses, and experts that a lossy mode applies one layer later.
        guesses: bytes of guesses that nothing has used so far, by place; those on their way among them.
    """

    def __init__(self, engine: Engine, budget_bytes: int | None) -> None:
        self.engine = engine
        shape = engine.shape
        self.budget_bytes = int(shape.top_k * shape.bytes_L.sum()) if budget_bytes is None else budget_bytes
        self.forget()

    def forget(self) -> None:
        """Nothing is on its way: the slots are new ones."""
        self.flying: dict[Place, Fetch] = {}
        self.guesses: dict[Place, int] = {}
        self._dropped: list[tuple[Callable[[], None], Fetch]] = []
        self._left = self.budget_bytes

    @property
    def active(self) -> bool:
        """Whether the policy guesses at all."""
        return self.engine.policy.state.note[S.SOURCE] != S.NOTHING and self.budget_bytes > 0

    def begin_pass(self) -> None:
        """A new pass has a budget of its own."""
        self._left = self.budget_bytes

    def land(self) -> None:
        """Tell the policy which guesses have arrived; a failed one gives its place back."""
        self._reclaim()
        for place in [place for place, fetch in self.flying.items() if fetch.done and place in self.guesses]:
            fetch = self.flying.pop(place)
            try:
                fetch.wait()
            except ReadFailed:
                self._lose(place, fetch)
            else:
                self.engine.policy.arrived(*place)

    def _lose(self, place: Place, fetch: Fetch) -> None:
        self.engine.policy.lost(*place)
        self.engine._stats.prefetch_failed += 1
        self._waste(place, fetch)
        self._retire(self.engine.layers[place[0]], place[1], fetch)

    def used(self, layer: Layer, experts: list[int]) -> dict[int, Fetch]:
        """The event's experts were asked for: those still on their way, now as urgent as any demand."""
        late: dict[int, Fetch] = {}
        for e in experts:
            place = (layer.number, e)
            self.engine._stats.prefetch_used_bytes += self.guesses.pop(place, 0)
            if place in self.flying:
                late[e] = self.flying.pop(place)
                late[e].hurry()
        return late

    def release(self, layer: Layer, e: int) -> None:
        """The policy let an expert go, or a guess that is still on its way: free its slot as soon as nothing writes there."""
        fetch = self.flying.pop((layer.number, e), None)
        self._waste((layer.number, e), fetch)
        if fetch is None:
            layer.give(e)
        else:
            fetch.drop()
            self._retire(layer, e, fetch)

    def _waste(self, place: Place, fetch: Fetch | None) -> None:
        size = self.guesses.pop(place, 0)
        if size:
            self.engine._stats.prefetch_wasted_bytes += size if fetch is None else fetch.moved_bytes

    def _retire(self, layer: Layer, e: int, fetch: Fetch) -> None:
        self.retire(layer, layer.held.pop(e), fetch)

    def retire(self, layer: Layer, slot: int, fetch: Fetch) -> None:
        """Give a slot back once no thread writes to it."""
        slots, index = layer.place(slot)
        self._dropped.append((lambda: slots.give(index), fetch))
        self._reclaim()

    def _reclaim(self) -> None:
        kept = []
        for give, fetch in self._dropped:
            if fetch.idle:
                give()
            else:
                kept.append((give, fetch))
        self._dropped = kept

    def make_room(self) -> None:
        """Wait until a dropped read lets go of its slot. Raises ReadFailed where none does, IndexError where none is left."""
        if not self._dropped:
            raise IndexError("no slot is left")
        waiting, end = len(self._dropped), time.monotonic() + self.engine.reader.timeout
        while len(self._dropped) == waiting:
            if time.monotonic() > end:
                raise ReadFailed(f"a read that nobody wants any more holds its slot for {self.engine.reader.timeout:g} s")
            time.sleep(1e-4)
            self._reclaim()

    def ask(self, layer: int, choice: Choice | None) -> None:
        """After an event (of layer -1: before the first), fetch what the policy now believes in."""
        policy = self.engine.policy
        if choice is not None:
            believe(policy, self.engine.layers, layer, choice)
        if self._left <= 0:
            return
        fetches = policy.prefetch(self._left)
        for l, e in fetches.evicted_M2.tolist():
            self.engine._stats.evicted(l)
            self.release(self.engine.layers[l], e)
        for l, e in fetches.fetch_N2.tolist():
            self._fetch(self.engine.layers[l], e)

    def _fetch(self, layer: Layer, e: int) -> None:
        try:
            slot = layer.take(e)
        except IndexError:  # every slot is in use for the moment
            self.engine.policy.lost(layer.number, e)
            return
        self.engine.trim()
        self.flying[layer.number, e] = self.engine._into(layer, e, slot, prefetch=True)
        self.guesses[layer.number, e] = layer.bytes_E[e]
        self._left -= layer.bytes_E[e]
        self.engine._stats.prefetched_bytes += layer.bytes_E[e]


def believe(policy: Policy, layers: list[Layer], at: int, choice: Choice) -> None:
    """Lay out what the next layers' routers say of this layer's router input, as the replay lays out a recorded trace."""
    note = policy.state.note
    coming = layers[at + 1 : at + 1 + int(note[S.DEPTH])]
    if not coming:
        return
    width = min(2 * policy.shape.top_k, int(policy.shape.experts_L.min()))
    with torch.no_grad():
        ids_TAM = look_ahead([layer.block for layer in coming], choice.x.detach(), width).numpy()
    for distance, layer in enumerate(coming):
        want(policy.state, layer.number, ids_TAM[:, distance].astype(np.uint16), 0, len(ids_TAM), int(note[S.WIDTH]))


def mean_scores(policy: Policy, logits_TE: Tensor) -> np.ndarray:
    """What one event's `scores_E` is: the mean over tokens of the softmax (or sigmoid) of logits as a trace holds them."""
    x_TE = logits_TE.detach().half().double().numpy()
    sigmoid = policy.state.note[S.SIGMOID]
    value_TE = 1 / (1 + np.exp(-x_TE)) if sigmoid else np.exp(x_TE - x_TE.max(1, keepdims=True))
    return (value_TE / value_TE.sum(1, keepdims=True)).mean(0)
