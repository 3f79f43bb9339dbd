"""Which models are in one tier: all or nothing, never more bytes than the tier has, evicted by a policy of the replay.

The policy sees each model as a layer with one expert of the model's own size, and one budget for all layers (scope
"global"): so models of different sizes share the tier, which slots of the largest size would waste. M models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from moesaic.core.errors import BadInput, MissingNeed
from moesaic.core.sizes import show_bytes
from moesaic.trace import sweep
from moesaic.trace.policies import state as S
from moesaic.trace.policies.policy import Policy, Shape


class Residency:
    """The contents of one tier. Nothing is moved here.

    Args:
        sizes: bytes of each model; insertion order numbers them.
        capacity: bytes of the tier.
        policy: `lru`, `lfu`, `slru`, `belady` (which needs `next_use`), written as for `moesaic replay`.
        pinned: models that never leave once they came, such as the router; they, and the largest other, must fit.

    Raises BadInput for a model that can never be here, and for a policy that keeps no cache of all models together.
    """

    def __init__(self, sizes: Mapping[str, int], capacity: int, policy: str = "lru", pinned: Iterable[str] = ()) -> None:
        if not sizes or any(size <= 0 for size in sizes.values()):
            raise BadInput(f"models of {dict(sizes)} bytes: give at least one, and more than 0 bytes for each")
        self.sizes, self.capacity = dict(sizes), int(capacity)
        self.pinned = frozenset(pinned)
        unknown = sorted(self.pinned - sizes.keys())
        if unknown:
            raise BadInput(f"pinned {', '.join(unknown)}: no such model here")
        held = sum(self.sizes[name] for name in self.pinned)
        for name, size in self.sizes.items():
            needed = held + (0 if name in self.pinned else size)
            if needed > self.capacity:
                beside = f" beside the pinned {', '.join(sorted(self.pinned))}" if held else ""
                raise BadInput(
                    f"{name} takes {show_bytes(needed)}{beside}, the budget is {show_bytes(self.capacity)}: raise it"
                )
        self._number = {name: i for i, name in enumerate(self.sizes)}
        self._names = list(self.sizes)
        self._in_use = dict.fromkeys(self.sizes, 0)
        self.policy = _built(policy)
        bytes_L = np.array(list(self.sizes.values()), np.int64)
        self.policy.start(Shape(np.ones(len(bytes_L), np.int64), bytes_L, 1), self.capacity)
        note = self.policy.state.note
        if not note[S.WHOLE] or not note[S.ADMIT]:
            raise BadInput(f"policy {policy} keeps no cache that all models share: lru, lfu, slru, or belady in a replay")
        # A model that runs is here, whatever the policy thinks of it: nothing streams past, what runs is not evicted.
        note[S.BYPASS], note[S.PINS] = 0, 1

    def resident(self) -> list[str]:
        """Models that are here."""
        here_L = self.policy.state.cell[S.RESIDENT, :, 0] == S.HERE
        return [self._names[i] for i in np.flatnonzero(here_L)]

    def __contains__(self, name: str) -> bool:
        return bool(self.policy.state.cell[S.RESIDENT, self._number[name], 0] == S.HERE)

    @property
    def used_bytes(self) -> int:
        return self.policy.used_bytes()

    def can_enter(self, name: str) -> bool:
        """Whether it is here, or fits once every model that may leave has left."""
        if name in self:
            return True
        free = self.capacity - self.used_bytes
        return free + sum(self.sizes[other] for other in self.resident() if self._may_leave(other)) >= self.sizes[name]

    def _may_leave(self, name: str) -> bool:
        return name not in self.pinned and not self._in_use[name]

    def touch(self, name: str, next_use: int | None = None) -> tuple[bool, list[str]]:
        """A request for a model: whether it was here, and who left for it; afterwards it is here.

        `next_use`: number of the request that asks for it next, for a policy that knows the future. Raises BadInput where
        it cannot enter now.
        """
        if not self.can_enter(name):
            raise BadInput(f"no room for {name} ({show_bytes(self.sizes[name])}): the models here are pinned or in use")
        state, number = self.policy.state, self._number[name]
        self._fix()
        self.policy.begin_step(fresh=True)
        decision = self.policy.event(number, [0], next_use=None if next_use is None else [next_use])
        gone = [self._names[i] for i, _ in decision.evicted_M2]
        assert state.cell[S.RESIDENT, number, 0] == S.HERE
        return bool(decision.action_n[0] == S.HIT), gone

    def _fix(self) -> None:
        """Tell the policy who must stay."""
        state = self.policy.state
        state.cell[S.FIXED, :, 0] = [not self._may_leave(name) for name in self._names]
        state.layer[S.STALE] = 1

    def enter(self, name: str) -> None:
        """It is in use: it stays until as many `leave`."""
        self._in_use[name] += 1

    def leave(self, name: str) -> None:
        self._in_use[name] -= 1
        assert self._in_use[name] >= 0, name

    def in_use(self, name: str) -> int:
        return self._in_use[name]

    def forget(self, name: str) -> None:
        """It is not here after all: loading it failed."""
        from moesaic.trace.policies.cache import drop

        if name in self:
            drop(self.policy.state, self._number[name], 0)


def _built(text: str) -> Policy:
    """A policy with one cache for all, which needs nothing but the future. Raises BadInput, MissingNeed."""
    built = sweep.build(text)
    if built.needs - {"future"} or not built.exact:
        raise MissingNeed(f"policy {text} needs {', '.join(sorted(built.needs)) or 'a model trained for it'}: models have none")
    if getattr(built, "scope", "layer") != "global" and "scope" not in text:
        built.scope = "global"
    return built
