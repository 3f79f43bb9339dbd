"""The balancer contract, and the two statistics that every balance loss is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moesaic.core.routing import Routing

Reduce = Callable[[Tensor], Tensor]
"""Sums over the data-parallel group (identity on one process); the result has no gradient."""

Total = Callable[[str, Tensor], Tensor]
"""(name, counts of this call) -> counts over the scope. A loss names each thing that it counts."""


class Scope(NamedTuple):
    """What a loss may count over: see `scope.Counting`, which makes them. Without `total` it is the call's own tokens."""

    mask_T: Tensor | None = None
    sequence_ids: Tensor | None = None
    reduce: Reduce | None = None
    total: Total | None = None

    def tally(self, name: str, counts: Tensor) -> Tensor:
        """These counts over the whole scope, detached."""
        return (counts if self.total is None else self.total(name, counts)).detach()


class Balancer:
    """`loss(routing, scope)` is a scalar without its coefficient (None for a controller that has no loss).

    `observe(routing, scope)` sees every training forward once, also under activation recomputation, and
    `after_step()` runs after the optimiser step. Counts are taken before capacity drops.
    """

    coefficient: float = 0.0
    output_tokens: int = 0
    """On how many of the layer's tokens the loss wants the outputs of all experts, in `routing.aux["outputs_END"]`."""

    def bind(self, router: nn.Module) -> Balancer:
        """Meet the router of the layer: a controller keeps it, a loss may read its shape."""
        return self

    def bind_bank(self, cost_E: Tensor) -> None:
        """Meet the bank: FLOPs per token of each router row, 0 for a row that no expert serves."""

    def loss(self, routing: Routing, scope: Scope) -> Tensor | None:
        return None

    def observe(self, routing: Routing, scope: Scope) -> None: ...

    def after_step(self) -> None: ...


def load_E(routing: Routing, scope: Scope) -> Tensor:
    """f [E], detached: share of the selected pairs sent to each router row; sums to 1 (0 when nothing is selected)."""
    return share_of(scope.tally("load", routing.counts_E(scope.mask_T)))


def share_of(counts_E: Tensor) -> Tensor:
    """Counts as shares of their sum, float32 along the last axis; zeros when there are none."""
    return (counts_E / counts_E.sum(-1, keepdim=True).clamp(min=1)).float()


def slots_per_token(routing: Routing, scope: Scope) -> Tensor:
    """Mean number of rows that a real token selected, over the scope: K, or less where slots stay empty."""
    pairs = scope.tally("load", routing.counts_E(scope.mask_T)).sum()
    tokens = torch.tensor(float(routing.tokens), device=pairs.device) if scope.mask_T is None else scope.mask_T.sum()
    return (pairs / scope.tally("tokens", tokens).clamp(min=1)).float()


def mean_probability_E(routing: Routing, scope: Scope) -> Tensor:
    """P [E], with gradient: mean over real tokens of the full probabilities."""
    return masked_mean(probabilities(routing), scope.mask_T)


def probabilities(routing: Routing) -> Tensor:
    return routing.logits_TE.float().softmax(-1) if routing.probs_TE is None else routing.probs_TE


def masked_mean(values_T: Tensor, mask_T: Tensor | None) -> Tensor:
    """Mean over the first axis of the rows whose mask is True."""
    if mask_T is None:
        return values_T.mean(0)
    weight = mask_T.to(values_T.dtype).view(-1, *[1] * (values_T.dim() - 1))
    return (values_T * weight).sum(0) / weight.sum().clamp(min=1)
