"""Whole models in tiers of memory: brought in when asked for, dropped when another needs the room.

Tiers go from the fastest, where models run, down to the one above the disk. A model comes up tier by tier, and lower tiers
keep their copy while their own policy likes it, so that a switch back is a copy and not a read. Weights are read-only:
what leaves is forgotten, never written back. KV caches and activations come on top of the budgets.
"""

from __future__ import annotations

import copy
import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moesaic.core.errors import BadInput, MoesaicError
from moesaic.core.sizes import show_bytes
from moesaic.serving.models.residency import Residency


@dataclass(frozen=True)
class Tier:
    """A memory: its name, bytes for models, and the torch device that models in it live on ("cpu", "cuda", ...)."""

    name: str
    capacity: int
    device: str = "cpu"


@dataclass(frozen=True)
class CachedModel:
    """A model that can be brought in: `load` reads it into the lowest tier, `bytes` is what it takes there at most.

    `measure(model)` says how much it takes, to hold it to its word.
    """

    key: str
    bytes: int
    load: Callable[[], Any]
    measure: Callable[[Any], int] | None = None
    pinned: bool = False


@dataclass
class TierStats:
    """What happened in a tier: loads are switches."""

    hits: int = 0
    loads: int = 0
    evictions: int = 0
    load_seconds: float = 0.0
    most_bytes: int = 0


class ModelCache:
    """Models by key, in tiers. Threads may share it: loads happen one after another, and models that are there do not wait.

    Args:
        models: all that can be asked for.
        tiers: from the fastest down. Each needs room for the pinned models and the largest other.
        policy: who leaves, in every tier (see `Residency`).
        move: copies a model to a tier's device; default: a deep copy on the CPU, `.to(device)` of one elsewhere, which has
            not yet run on a GPU.
        on_drop: called with (key, model) before a model leaves the fastest tier.
    """

    def __init__(
        self,
        models: Sequence[CachedModel],
        tiers: Sequence[Tier],
        *,
        policy: str = "lru",
        move: Callable[[Any, str], Any] | None = None,
        on_drop: Callable[[str, Any], None] = lambda key, model: None,
    ) -> None:
        self.models = {model.key: model for model in models}
        if len(self.models) != len(models):
            raise BadInput("two models have the same name: names tell them apart")
        if not tiers:
            raise BadInput("models need at least one tier to live in")
        if tiers[-1].device != "cpu":
            raise BadInput(f"the lowest tier is on {tiers[-1].device}: models are read into the CPU's memory, add a tier there")
        self.tiers = list(tiers)
        sizes = {model.key: model.bytes for model in models}
        pinned = [model.key for model in models if model.pinned]
        self.residencies = [Residency(sizes, tier.capacity, policy, pinned) for tier in tiers]
        if any("future" in residency.policy.needs for residency in self.residencies):
            raise BadInput(f"policy {policy} needs to know the future: nobody knows it while requests come in; simulate it")
        self.stats = [TierStats() for _ in tiers]
        self._held: list[dict[str, Any]] = [{} for _ in tiers]
        self._move = move or _copied
        self._on_drop = on_drop
        self._lock, self._loading = threading.Lock(), threading.Lock()

    def resident(self, tier: int = 0) -> list[str]:
        return self.residencies[tier].resident()

    def used_bytes(self, tier: int = 0) -> int:
        return self.residencies[tier].used_bytes

    def can_enter(self, key: str) -> bool:
        """Whether `acquire` would find room now: models in use cannot leave."""
        with self._lock:
            return all(residency.can_enter(key) for residency in self.residencies)

    def is_ready(self, key: str) -> bool:
        """Whether it is in the fastest tier, loaded: `acquire` then returns at once."""
        with self._lock:
            return key in self._held[0]

    @contextmanager
    def use(self, key: str) -> Iterator[Any]:
        """The model in the fastest tier, which stays there meanwhile."""
        model = self.acquire(key)
        try:
            yield model
        finally:
            self.release(key)

    def acquire(self, key: str) -> Any:
        """Bring a model in and keep it until `release`. Raises BadInput where no room can be made; what `load` raises."""
        if key not in self.models:
            raise BadInput(f"no model {key!r}: one of {', '.join(self.models)}")
        with self._lock:
            if key in self._held[0]:
                return self._hit(key, 0)
        with self._loading:
            return self._bring(key, 0)

    def reserve(self, key: str) -> Callable[[], Any]:
        """`acquire` in two steps: room is made in the books now, and what is returned brings the model in, in any thread.

        For who decides in one thread what others may use meanwhile: nobody can take the room. Raises BadInput where none can
        be made, or while the model is coming already.
        """
        with self._lock:
            if key in self._held[0]:
                model = self._hit(key, 0)
                return lambda: model
            if key in self.residencies[0]:
                raise BadInput(f"{key} is being loaded already: wait for that")
            leaving = self._admit(key, 0)

        def bring() -> Any:
            with self._loading:
                return self._fill(key, 0, leaving)

        return bring

    def release(self, key: str) -> None:
        with self._lock:
            self.residencies[0].leave(key)

    def close(self) -> None:
        """Drop everything."""
        with self._loading:
            for tier in range(len(self.tiers)):
                for key in self._held[tier]:
                    self.residencies[tier].forget(key)
                self._let_go(tier, self._held[tier])

    def _hit(self, key: str, tier: int) -> Any:
        self.residencies[tier].touch(key)
        self.stats[tier].hits += 1
        if tier == 0:
            self.residencies[0].enter(key)
        return self._held[tier][key]

    def _bring(self, key: str, tier: int) -> Any:
        """The model in that tier, in use where that is the fastest. Books are kept under the lock, weights move without it."""
        with self._lock:
            if key in self._held[tier]:
                return self._hit(key, tier)
            leaving = self._admit(key, tier)
        return self._fill(key, tier, leaving)

    def _admit(self, key: str, tier: int) -> dict[str, Any]:
        """Book a model in; returns those that have to leave, which are nobody's any more."""
        _, gone = self.residencies[tier].touch(key)
        if tier == 0:
            self.residencies[0].enter(key)
        self.stats[tier].evictions += len(gone)
        return {other: self._held[tier].pop(other) for other in gone}

    def _fill(self, key: str, tier: int, leaving: dict[str, Any]) -> Any:
        residency, stats = self.residencies[tier], self.stats[tier]
        self._let_go(tier, leaving)  # room first: the budget holds while the new one comes in
        before = time.perf_counter()
        try:
            if tier + 1 == len(self.tiers):
                model = self._read(key)
            else:
                model = self._move(self._bring(key, tier + 1), self.tiers[tier].device)
        except BaseException:
            with self._lock:
                if tier == 0:
                    residency.leave(key)
                residency.forget(key)
            raise
        with self._lock:
            self._held[tier][key] = model
            stats.loads += 1
            stats.load_seconds += time.perf_counter() - before
            stats.most_bytes = max(stats.most_bytes, residency.used_bytes)
        return model

    def _read(self, key: str) -> Any:
        known = self.models[key]
        model = known.load()
        took = known.bytes if known.measure is None else known.measure(model)
        if took > known.bytes:
            raise MoesaicError(f"{key} takes {show_bytes(took)}, {show_bytes(known.bytes)} were kept for it: it was let go")
        return model

    def _let_go(self, tier: int, leaving: dict[str, Any]) -> None:
        for key, model in leaving.items():
            if tier == 0:
                self._on_drop(key, model)
        found = bool(leaving)
        model = None
        leaving.clear()
        if found:
            gc.collect()  # modules and their hooks refer to each other in circles


def _copied(model: Any, device: str) -> Any:
    twin = copy.deepcopy(model)
    return twin.to(device) if device != "cpu" else twin
