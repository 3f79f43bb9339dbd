"""The contract of a lossy mode: what it may change about one experts call of a streamed model."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moesaic.core.registry import Entry, entries
from moesaic.core.routing import Dispatch

if TYPE_CHECKING:
    from moesaic.serving.streamed.engine import Engine
    from moesaic.serving.streamed.layer import Layer


class Changed(NamedTuple):
    """What is left of a choice. `lost`: how many (token, expert) pairs of the router's own it lacks."""

    dispatch: Dispatch
    ids_TK: Tensor | None
    lost: int = 0


class Lossy:
    """Base of all modes. Parameters are the schema; at its neutral setting a mode changes no bit."""

    @cached_property
    def entry(self) -> Entry:
        """What the registry says of this mode."""
        return next(e for e in entries("lossy") if e.build is type(self))

    @property
    def neutral(self) -> bool:
        """Whether, so set, it cannot change anything."""
        return False

    @property
    def options(self) -> dict[str, Any]:
        """Its parameters as they are set."""
        return {name: getattr(self, name) for name in self.entry.parameters}

    def __str__(self) -> str:
        given = "+".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.entry.name}:{given}"

    def attach(self, engine: Engine) -> None:
        """Called once, before the first pass. Raises BadInput for a model that it cannot change."""

    def choose(self, layer: Layer, dispatch: Dispatch, ids_TK: Tensor | None, absent_E: Tensor) -> Changed:
        """Before the cache hears of a layer's choice: what is left of it. `absent_E`: experts not in memory.

        `ids_TK`: the choice as the block made it, None where the bank is run by hand.
        """
        return Changed(dispatch, ids_TK)

    def put_off(self, layer: Layer, dispatch: Dispatch, missing: list[int]) -> set[int]:
        """Which of the experts that are being read now the next layer's call applies."""
        return set()


def keep_pairs(dispatch: Dispatch, keep_S: Tensor, weight_S: Tensor | None = None) -> Dispatch:
    """The dispatch without the other pairs; `weight_S`: other weights, of all pairs."""
    weight_S = dispatch.weight_S if weight_S is None else weight_S
    counts_E = torch.bincount(dispatch.expert_S[keep_S], minlength=dispatch.num_experts)
    offsets_E1 = torch.cat([counts_E.new_zeros(1), counts_E.cumsum(0)])
    return Dispatch(dispatch.token_S[keep_S], weight_S[keep_S], offsets_E1, dispatch.tokens)


def without(ids_TK: Tensor | None, dispatch: Dispatch, gone_S: Tensor) -> Tensor | None:
    """The choice with these pairs of the dispatch as empty slots."""
    if ids_TK is None:
        return None
    gone_TE = torch.zeros(dispatch.tokens, dispatch.num_experts + 1, dtype=torch.bool)
    gone_TE[dispatch.token_S[gone_S], dispatch.expert_S[gone_S]] = True
    flat_TK = ids_TK.reshape(dispatch.tokens, -1).long()
    held_TK = flat_TK.where((flat_TK >= 0) & (flat_TK < dispatch.num_experts), dispatch.num_experts)
    return flat_TK.masked_fill(gone_TE.gather(1, held_TK), -1)
