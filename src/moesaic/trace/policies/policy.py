"""The contract of a cache policy: the object that the replay simulates and a live engine drives, event by event."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.core.registry import Entry, entries
from moesaic.trace.hardware import Hardware
from moesaic.trace.policies import state as S
from moesaic.trace.policies.allocation import split

Scope = Literal["layer", "global"]


@dataclass(frozen=True)
class Shape:
    """What is cached: routed experts and bytes of one expert of each layer, and slots per token."""

    experts_L: np.ndarray
    bytes_L: np.ndarray
    top_k: int

    @property
    def total_bytes(self) -> int:
        return int((self.experts_L * self.bytes_L).sum())


class Decision(NamedTuple):
    """What becomes of an event's experts. `action_n`: state.HIT, LOAD (fetch and keep), STREAM (fetch, use, drop), HOST
    (compute there) or LATE (already on its way); `evicted_M2`: (layer, expert) that left."""

    experts_n: np.ndarray
    action_n: np.ndarray
    on_host_n: np.ndarray
    evicted_M2: np.ndarray


class Fetches(NamedTuple):
    """What to prefetch, best first, and who left for it; both as (layer, expert)."""

    fetch_N2: np.ndarray
    evicted_M2: np.ndarray


class Policy:
    """Base of all policies: `start` sizes it, then `begin_step`, `event` and `prefetch` follow the model.

    Nothing is measured or moved here: the caller moves bytes and says `arrived`. State is arrays (`state.State`).
    """

    rule: int = S.RECENCY
    scope: str = "layer"
    source: int = S.NOTHING
    where: int = S.MOVE
    learns: bool = False
    """Whether `learn` must be given earlier routing before `start`."""

    state: S.State
    memory: S.Memory

    @property
    def entry(self) -> Entry:
        """What the registry says of this policy."""
        return next(e for e in entries("policies") if e.build is type(self))

    def start(self, shape: Shape, capacity_bytes: int, hardware: Hardware | None = None, slots_L: Any = None) -> None:
        """Begin with an empty cache of that many bytes. `slots_L` fixes the experts of each layer instead."""
        if capacity_bytes < 0:
            raise BadInput(f"a cache of {capacity_bytes} bytes: give 0 or more")
        self.shape, self.capacity_bytes = shape, int(capacity_bytes)
        self.hardware = hardware or Hardware()
        whole = self.scope == "global" and slots_L is None
        if whole:
            capacity_G = np.array([min(self.capacity_bytes, shape.total_bytes)])
        else:
            if slots_L is None:
                slots_L = split(self.capacity_bytes, shape.experts_L, shape.bytes_L)
            capacity_G = np.asarray(slots_L) * shape.bytes_L
        self.state = S.new_state(shape.experts_L, shape.bytes_L, capacity_G, whole)
        self.memory = S.new_memory(len(shape.experts_L), int(shape.experts_L.max()))
        note = self.state.note
        note[S.RULE], note[S.SOURCE], note[S.WHERE] = self.rule, self.source, self.where
        note[S.BYPASS_TOKENS] = getattr(self, "bypass_tokens", 0)
        self._hardware_array = self.hardware.array()
        self.setup()

    def setup(self) -> None:
        """What a policy adds to an empty cache."""

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

        `scores_E`: mean router logits, `ahead_AM`: ids that the next layers would choose, best first, `next_use`: number of
        the event that uses each expert next. Raises BadInput where the policy needs one that is missing.
        """
        from moesaic.trace.policies.engine import decide

        c, n = self.state, len(experts)
        c.event[S.IDS, :n] = experts
        c.event[S.TOKENS, :n] = 1 if tokens is None else tokens
        if next_use is not None:
            c.event[S.NEXT, :n] = next_use
        decide(c, self.memory, self._hardware_array, layer, n, step_tokens)
        return Decision(
            c.event[S.IDS, :n].copy(),
            c.event[S.ACT, :n].copy(),
            c.event[S.ON_HOST, :n].astype(bool),
            c.gone[: c.note[S.GONE]].copy(),
        )

    def resident(self, layer: int) -> np.ndarray:
        """Mask [E] of the experts of a layer that are in the cache."""
        return self.state.cell[S.RESIDENT, layer] == S.HERE
