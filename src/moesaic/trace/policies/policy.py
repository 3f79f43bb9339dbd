"""The contract of a cache policy: the object that the replay simulates and a live engine drives, event by event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from moesaic.core.errors import BadInput, MissingNeed
from moesaic.core.registry import Entry, entries
from moesaic.trace.hardware import Hardware
from moesaic.trace.policies import state as S
from moesaic.trace.policies.allocation import split

if TYPE_CHECKING:
    from moesaic.trace.order import Order
    from moesaic.trace.policies.history import History

Scope = Literal["layer", "global"]


@dataclass(frozen=True)
class Shape:
    """What is cached: routed experts and bytes of one expert of each layer, and slots per token.

    `bytes_LE`: of each expert, 0 where a layer has no such expert; None: all of a layer have `bytes_L`. Where they differ,
    `bytes_L` is their mean, rounded up (`Shape.of_experts`).
    """

    experts_L: np.ndarray
    bytes_L: np.ndarray
    top_k: int
    bytes_LE: np.ndarray | None = None

    @cached_property
    def sizes_LE(self) -> np.ndarray:
        """Bytes of each expert, 0 where a layer has no such expert."""
        if self.bytes_LE is not None:
            return self.bytes_LE
        real_LE = np.arange(int(self.experts_L.max())) < self.experts_L[:, None]
        return real_LE * self.bytes_L[:, None]

    @classmethod
    def of_experts(cls, sizes: Sequence[Sequence[int]], top_k: int) -> Shape:
        """`sizes`: bytes of each expert of each layer."""
        experts_L = np.array([len(row) for row in sizes], np.int64)
        bytes_LE = np.zeros((len(sizes), int(experts_L.max())), np.int64)
        for layer, row in enumerate(sizes):
            bytes_LE[layer, : len(row)] = row
        return cls(experts_L, -(-bytes_LE.sum(1) // experts_L), top_k, bytes_LE)

    @property
    def total_bytes(self) -> int:
        return int(self.sizes_LE.sum())


class Decision(NamedTuple):
    """What becomes of an event's experts, in the order given.

    `action_n`: state.HIT, LOAD (fetch and keep), STREAM (fetch, use, drop) or LATE (already on its way). Where `on_host_n`
    holds, the expert runs on the host instead and nothing is fetched. `evicted_M2`: (layer, expert) that left.
    """

    experts_n: np.ndarray
    action_n: np.ndarray
    on_host_n: np.ndarray
    evicted_M2: np.ndarray


class Fetches(NamedTuple):
    """What to fetch ahead, best first, and who left for it; both as (layer, expert)."""

    fetch_N2: np.ndarray
    evicted_M2: np.ndarray


class Policy:
    """Base of all policies: `start` sizes it, then `begin_step`, `event` and `prefetch` follow the model.

    Nothing is measured or moved here: the caller moves bytes and says `arrived`. State is arrays (`state.State`), and a
    policy is its numbers in them: what makes an expert worth keeping, where misses run, what prefetch believes in.
    """

    rule: int = S.RECENCY
    scope: Scope = "layer"
    source: int = S.NOTHING
    where: int = S.MOVE
    learns: bool = False
    """Whether it can use earlier routing, given by `learn` before `start`."""

    state: S.State
    memory: S.Memory
    history: History | None = None

    @cached_property
    def entry(self) -> Entry:
        """What the registry says of this policy."""
        return next(e for e in entries("policies") if e.build is type(self))

    @property
    def exact(self) -> bool:
        """Whether the model's output is what it would be without this policy."""
        return self.entry.exact

    @property
    def needs(self) -> frozenset[str]:
        """What each event must bring: future, scores, ahead, predicted; or history, which `learn` gives."""
        return self.entry.needs

    def learn(self, history: History) -> None:
        """Take earlier routing in; `start` builds on it."""
        self.history = history

    def start(self, shape: Shape, capacity_bytes: int, hardware: Hardware | None = None) -> None:
        """Begin with an empty cache of that many bytes. Raises MissingNeed without a history that it cannot do without."""
        if capacity_bytes < 0:
            raise BadInput(f"a cache of {capacity_bytes} bytes: give 0 or more")
        if "history" in self.needs and self.history is None:
            raise MissingNeed(
                f"policy {self.entry.name} learns from earlier routing: give it with --learn-from FILE or --learn-share"
            )
        self.shape, self.capacity_bytes = shape, min(int(capacity_bytes), shape.total_bytes)
        self.hardware = hardware or Hardware()
        whole = self.scope == "global"
        if whole:
            capacity_G = np.array([self.capacity_bytes])
        else:
            capacity_G = np.minimum(self.slots() * shape.bytes_L, shape.sizes_LE.sum(1))
        self.state = S.new_state(shape.experts_L, shape.bytes_L, shape.sizes_LE, capacity_G, whole)
        self.memory = self.remember()
        note = self.state.note
        note[S.RULE], note[S.SOURCE], note[S.WHERE] = self.rule, self.source, self.where
        note[S.BYPASS_TOKENS] = getattr(self, "bypass_tokens", 0)
        note[S.AT_MOST] = self.capacity_bytes
        note[S.WIDTH], note[S.DEPTH] = shape.top_k, 1
        self._hardware = self.hardware.array()
        self._last = (0, 0, 1)
        self.setup()

    def slots(self) -> np.ndarray:
        """Slots of each layer, where the cache is not one for all."""
        return self.split(self.capacity_bytes)

    def split(self, capacity_bytes: int) -> np.ndarray:
        """Slots of each layer, in proportion to its experts; all of them where everything fits."""
        if capacity_bytes >= self.shape.total_bytes:
            return self.shape.experts_L.copy()
        return split(capacity_bytes, self.shape.experts_L, self.shape.bytes_L)

    def remember(self) -> S.Memory:
        """What was learnt, as arrays."""
        return S.new_memory(len(self.shape.experts_L), int(self.shape.experts_L.max()))

    def setup(self) -> None:
        """What a policy adds to an empty cache: its numbers, and what is resident from the start."""

    def place(self, layer: int, experts: Any) -> None:
        """Make experts resident before the first event, for good: they are never evicted."""
        from moesaic.trace.policies.cache import put

        for e in experts:
            put(self.state, layer, int(e), S.HERE)
            self.state.cell[S.FIXED, layer, int(e)] = 1

    def begin_step(self, fresh: bool = False, prefill: bool = False) -> None:
        """A forward pass begins; `fresh` where a new request does, `prefill` where it reads many tokens at once."""
        from moesaic.trace.policies.engine import begin_step

        begin_step(self.state, self.memory, fresh, prefill)

    def event(
        self,
        layer: int,
        experts: Any,
        tokens: Any = None,
        *,
        step_tokens: int = 1,
        scores_E: np.ndarray | None = None,
        ahead_AM: np.ndarray | None = None,
        next_use: Any = None,
    ) -> Decision:
        """One MoE layer ran its router: distinct `experts`, most tokens first, with their token counts.

        `scores_E`: mean router probabilities of the pass; `ahead_AM`: ids that the routers of the next layers would choose,
        best first, below 0 = none; `next_use`: number of the event that uses each expert next (pass x layers + layer).
        Raises MissingNeed where the policy lives on one that is missing.
        """
        from moesaic.trace.policies.engine import decide

        given = {"scores": scores_E, "ahead": ahead_AM, "future": next_use}
        for need, value in given.items():
            if need in self.needs and value is None:
                raise MissingNeed(f"policy {self.entry.name} needs {need} with every event")
        c, n = self.state, len(experts)
        c.event[S.IDS, :n] = experts
        c.event[S.TOKENS, :n] = 1 if tokens is None else tokens
        if next_use is not None:
            c.event[S.NEXT, :n] = next_use
        if scores_E is not None:
            c.score[0, : len(scores_E)] = scores_E
        decide(c, self.memory, self._hardware, layer, n, step_tokens)
        if ahead_AM is not None:
            for distance, ids in enumerate(np.asarray(ahead_AM)[: c.note[S.DEPTH]]):
                if layer + 1 + distance < len(self.shape.experts_L):
                    self.expect(layer + 1 + distance, ids[: c.note[S.WIDTH]])
        self._last = (layer, n, step_tokens)
        return Decision(
            c.event[S.IDS, :n].copy(),
            c.event[S.ACT, :n].copy(),
            c.event[S.ON_HOST, :n].astype(bool),
            c.gone[: c.note[S.GONE]].copy(),
        )

    def expect(self, layer: int, experts: Any, tokens: Any = None) -> None:
        """Say what a coming layer is believed to use, best first."""
        ids = np.asarray(experts, np.int64)
        keep = ids >= 0
        count = int(keep.sum())
        self.state.cell[S.WANT, layer, :count] = ids[keep]
        self.state.cell[S.VOTED, layer, :count] = 1 if tokens is None else np.asarray(tokens)[keep]
        self.state.layer[S.WANTED, layer] = count

    def prefetch(self, budget_bytes: int) -> Fetches:
        """After an event: what to fetch while the link idles, best first, within so many bytes. It is on its way from then
        on; say `arrived` when it can be used."""
        from moesaic.trace.policies.cache import reserve
        from moesaic.trace.policies.engine import next_fetch, plan, skip_layer

        c, m = self.state, self.memory
        layer, n, tokens = self._last
        gone = int(c.note[S.GONE])
        plan(c, m, layer, n, tokens)
        found = []
        while True:
            l, e = next_fetch(c, m, self._hardware)
            if e < 0 or c.cell[S.SIZE, l, e] > budget_bytes:
                break
            if reserve(c, l, e):
                found.append((l, e))
                budget_bytes -= int(c.cell[S.SIZE, l, e])
            else:
                skip_layer(c)
        return Fetches(np.array(found, np.int64).reshape(-1, 2), c.gone[gone : c.note[S.GONE]].copy())

    def arrived(self, layer: int, expert: int) -> None:
        """A prefetched expert can be used from now on."""
        from moesaic.trace.policies.cache import arrived

        arrived(self.state, layer, expert)

    def lost(self, layer: int, expert: int) -> None:
        """A prefetched expert that was on its way will not come: its place is free again."""
        from moesaic.trace.policies.cache import turn_back

        turn_back(self.state, layer, expert)

    def share_out(self, demand_L: np.ndarray) -> None:
        """Between passes: give layers slots in proportion to what they are believed to use."""
        from moesaic.trace.policies.allocation import highest_averages
        from moesaic.trace.policies.cache import resize

        c = self.state
        resize(c, highest_averages(c.note[S.AT_MOST], c.layer[S.EXPERTS], c.layer[S.BYTES], np.asarray(demand_L, np.float64)))

    def resident(self, layer: int) -> np.ndarray:
        """Mask [E] of the experts of a layer that can be used at once."""
        held = self.state.cell[S.RESIDENT, layer]
        return (held == S.HERE) | (held == S.STAGED)

    def used_bytes(self) -> int:
        """Bytes that are taken, by what is here or on its way."""
        group, note = self.state.group, self.state.note
        staged = int(getattr(self, "staging_bytes", 0)) - int(note[S.STAGE_ROOM]) if note[S.STAGE] else 0
        return int((group[S.CAPACITY] - group[S.ROOM]).sum()) + staged

    def arrange(self, trace: Any, sequences: np.ndarray | None, batch: int) -> np.ndarray | None:
        """The order in which a replay in batches takes the sequences; most keep it."""
        return sequences

    def replayed(self, trace: Any, order: Order) -> Replayed:
        """What a replay must lay out for this policy, and how the trace is changed by it. Most need nothing."""
        return Replayed()


class Replayed(NamedTuple):
    """What a policy adds to a replay: predictions [T, L, M] in replay order, demand [W, L] of every window, other choices
    [T, L, K] in trace order than the recorded ones, and notes for the reader."""

    guess_TLM: np.ndarray | None = None
    demand_WL: np.ndarray | None = None
    experts_TLK: np.ndarray | None = None
    notes: tuple[str, ...] = ()
