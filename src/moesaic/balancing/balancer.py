"""The balancer contract, and the two statistics that every balance loss is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from moesaic.core.routing import Routing

Reduce = Callable[[Tensor], Tensor]
"""Sums counts over the data-parallel group (identity on one process); probabilities stay local."""


class Scope(NamedTuple):
    """What a loss may average over. `counts_E`, when given, replaces the local counts: the global batch's."""

    mask_T: Tensor | None = None
    sequence_ids: Tensor | None = None
    reduce: Reduce | None = None
    counts_E: Tensor | None = None


class Balancer:
    """`loss(routing, scope)` is a scalar without its coefficient (None for a controller that has no loss).

    `observe(routing, scope)` sees every training forward once, also under activation recomputation, and
    `after_step()` runs after the optimiser step. Counts are taken before capacity drops.
    """

    coefficient: float = 0.0

    def bind(self, router: nn.Module) -> Balancer:
        """Meet the router of the layer: a controller keeps it, a loss may read its shape."""
        return self

    def loss(self, routing: Routing, scope: Scope) -> Tensor | None:
        return None

    def observe(self, routing: Routing, scope: Scope) -> None: ...

    def after_step(self) -> None: ...


def load_E(routing: Routing, scope: Scope) -> Tensor:
    """f [E], detached: share of the selected pairs sent to each router row; sums to 1 (0 when nothing is selected)."""
    counts_E = routing.counts_E(scope.mask_T) if scope.counts_E is None else scope.counts_E
    if scope.reduce is not None:
        counts_E = scope.reduce(counts_E)
    return (counts_E / counts_E.sum().clamp(min=1)).detach()


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
