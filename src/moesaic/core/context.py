"""What a router may see besides its input. A host fills what it has; a missing need is an error that names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from moesaic.core.errors import MissingNeed


class Attention(Protocol):
    """The attention of the block before the router, given without materialising its [N, N] matrix."""

    def mix(self, values_TC: Tensor) -> Tensor:
        """A @ values, A averaged over heads: each token's values mixed with the attention weights it used."""
        ...

    def probs(self) -> Tensor:
        """The materialised matrix, [B, heads, N, N]. Costs memory; `mix` is the cheap way."""
        ...


@dataclass(frozen=True)
class RoutingContext:
    """Per-call context of a router. T tokens are B sequences flattened; None means that the host has it not.

    `needs` of a router name fields of this class. `mode` is explicit: train and eval may route differently.
    """

    mode: Literal["train", "eval"] = "eval"
    causal: bool = False
    previous: Any = None
    """What the router of the previous MoE layer returned as `state` (None in the first MoE layer)."""
    threads_state: bool = False
    """The host hands `state` from layer to layer (need: "previous")."""
    carry: Mapping[str, Any] | None = None
    """Per-token tensors that layers thread through depth, by name: `Routing.carry` of the previous MoE layer, {} in the
    first one of every forward, None when the host threads nothing. Nothing of it outlives a forward or a decode step."""
    attention: Attention | None = None
    token_ids: Tensor | None = None
    positions: Tensor | None = None
    sequence_ids: Tensor | None = None
    mask: Tensor | None = None
    """True for real tokens, bool [T]; None when nothing is padding."""
    task_ids: Tensor | None = None
    modality_ids: Tensor | None = None
    language_ids: Tensor | None = None
    class_ids: Tensor | None = None
    timesteps: Tensor | None = None
    layer: int = 0
    step: int | None = None
    generator: torch.Generator | None = None
    activations: Callable[[Tensor], Tensor] | None = None
    """The bank's own low-cost view of the tokens, [T, D] -> [T, E, ...]; given by the MoE layer when its bank has one."""
    memo: dict[str, Any] = field(default_factory=dict)
    """Scratch of one call: lets a bank reuse what its router already computed."""

    def need(self, name: str, router: str = "this router") -> Any:
        """The field `name`. Raises MissingNeed when the host did not give it."""
        if name == "previous":
            if not self.threads_state:
                raise MissingNeed(f"{router} needs 'previous' (state across layers); this host does not thread router state")
            return self.previous
        if name not in _FIELDS:
            raise MissingNeed(f"{router} needs {name!r}, which no RoutingContext carries")
        value = getattr(self, name)
        if value is None:
            raise MissingNeed(f"{router} needs {name!r}, which this host does not give")
        return value

    def replace(self, **changes: Any) -> RoutingContext:
        return replace(self, **changes)

    @property
    def training(self) -> bool:
        return self.mode == "train"


_FIELDS = frozenset(f.name for f in fields(RoutingContext))
