"""MoTE: switch off, or force on, the experts that a behaviour uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.steering.behaviour import BehaviourMap
from moesaic.steering.kept import kept
from moesaic.steering.steer import ByPolicy
from moesaic.view import Policy
from moesaic.view.slots import empty, rescaled, token_major

Experts = Mapping[int | str, Sequence[int]] | Sequence[str]


@register("steering", "mote", paper="2502.11096", card="surgery-and-steering.md#mixture-of-tunable-experts-mote", exact=False)
class Mote(ByPolicy):
    """Experts by block: {layer or block name: ids}, or ["3.7", ...] (layer 3, expert 7), or the `top` of a behaviour map.

    `off`: weight 0 in every token that selected them, the token's other weights scaled up to its former sum (1, or the model's
    scaling factor); no other expert takes the slot, shared experts stay as they are, and a token whose experts are all off
    gets nothing from the routed ones. `replace=True` masks them before top-k instead, so that the next expert enters.
    `on`: in every token, an expert takes the weakest slot (its own, where it was selected) with `weight` times the token's
    largest weight; then the sum is restored (the paper gives no weight: inference of the card). Biased selection does not
    matter: the finished weights are what is changed.
    `map`: a file of `moesaic steer find`, whose `top` experts are switched `do`.
    """

    files: ClassVar[frozenset[str]] = frozenset({"map"})

    def __init__(
        self,
        off: Experts | None = None,
        on: Experts | None = None,
        map: str | None = None,
        top: int = 10,
        do: Literal["off", "on"] = "off",
        replace: bool = False,
        weight: float = 1.0,
    ) -> None:
        if off is None and on is None and map is None:
            raise BadInput("mote: give off, on or map")
        if do not in ("off", "on") or not 0 <= weight < float("inf"):
            raise BadInput(f"mote: do {do!r} is off or on; weight {weight} is 0 or more")
        given = {"off": _by_block(off, "off"), "on": _by_block(on, "on")}
        if map is not None:
            for name, ids in kept(BehaviourMap.read, map).top(top).items():
                given[do].setdefault(name, []).extend(ids)
        self.off, self.on, self.replace, self.weight = given["off"], given["on"], replace, weight

    def check(self) -> None:
        blocks = self.experts()
        self.off_of, self.on_of = ({b.name: _ids(given, b) for b in blocks} for given in (self.off, self.on))
        for word, given in (("off", self.off), ("on", self.on)):
            for key in given:
                if not any(key in (block.name, block.layer) for block in blocks):
                    raise BadInput(f"mote {word}: no MoE block {key!r}; layers are {sorted({b.layer for b in blocks})}")
        for block in blocks:
            if len(self.on_of[block.name]) > block.top_k:
                raise BadInput(f"mote on: {block.name} has {block.top_k} slots, given {self.on_of[block.name]}")
            both = set(self.on_of[block.name]) & set(self.off_of[block.name])
            if both:
                raise BadInput(f"mote: expert {min(both)} of {block.name} is to be off and on")

    def policy(self) -> Policy:
        without = {name: ids for name, ids in self.off_of.items() if ids} if self.replace else None
        return Policy(without=without or None, fn=self.tune)

    def tune(self, routing: Routing, block: Any) -> Routing | None:
        off, on = ([] if self.replace else self.off_of[block.name]), self.on_of[block.name]
        if off:
            routing = switch_off(routing, off)
        return switch_on(routing, on, self.weight) if on else routing


def switch_off(routing: Routing, experts: Sequence[int]) -> Routing:
    """The experts' slots emptied, the rest of each token scaled to its former sum; the same routing where none is selected."""
    ids_TK, _ = token_major(routing)
    return empty(routing, torch.isin(ids_TK, torch.tensor(list(experts), device=ids_TK.device)))


def switch_on(routing: Routing, experts: Sequence[int], weight: float | Tensor = 1.0) -> Routing:
    """Each expert in every token: in its own slot, else in the weakest that is not forced; the token's sum stays.

    `weight`: times the token's largest weight, or the weights themselves, [T].
    """
    ids_TK, weights_TK = token_major(routing)
    forced_TK = torch.zeros_like(ids_TK, dtype=torch.bool)
    given_T = weight.to(weights_TK) if isinstance(weight, Tensor) else weight * weights_TK.amax(1)
    made_TK = weights_TK
    for expert in experts:
        here_TK = ids_TK == expert
        weakest_T = made_TK.masked_fill(forced_TK, float("inf")).argmin(1)
        at_T1 = torch.where(here_TK.any(1), here_TK.int().argmax(1), weakest_T).unsqueeze(1)
        ids_TK = ids_TK.scatter(1, at_T1, expert)
        made_TK = made_TK.scatter(1, at_T1, given_T.unsqueeze(1))
        forced_TK = forced_TK.scatter(1, at_T1, True)
    return routing.replace(experts_TK=ids_TK, weights_TK=rescaled(made_TK, weights_TK))


def _by_block(given: Experts | None, what: str) -> dict[int | str, list[int]]:
    if given is None:
        return {}
    if isinstance(given, Mapping):
        pairs = [(key, expert) for key, ids in given.items() for expert in ([ids] if isinstance(ids, int) else ids)]
    else:
        words = [given] if isinstance(given, str | float) else given
        pairs = [_pair(word, what) for word in words]
    found: dict[int | str, list[int]] = {}
    for key, expert in pairs:
        if isinstance(expert, bool) or not isinstance(expert, int):
            raise BadInput(f"mote {what}: {expert!r} is no expert id")
        found.setdefault(key, []).append(expert)
    return found


def _pair(word: Any, what: str) -> tuple[int, int]:
    layer, dot, expert = str(word).partition(".")
    if not dot or not layer.isdecimal() or not expert.isdecimal():
        raise BadInput(f'mote {what}: {word!r}: give "LAYER.EXPERT" in quotes, or {{layer: [experts]}}')
    return int(layer), int(expert)


def _ids(given: Mapping[int | str, list[int]], block: Any) -> list[int]:
    ids = sorted({expert for key in (block.name, block.layer) for expert in given.get(key, [])})
    if ids and not 0 <= ids[0] <= ids[-1] < block.num_experts:
        raise BadInput(f"mote: {block.name} has experts 0 to {block.num_experts - 1}, given {ids}")
    return ids
