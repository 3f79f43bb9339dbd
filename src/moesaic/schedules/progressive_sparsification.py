"""Sigma-MoE-Tiny's progressive sparsification: the lowest layers start with more experts, and are cut to one late."""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.schedules.schedule import Schedule


@register("schedules", "progressive_sparsification", paper="2512.16248", card="layers-and-balancing.md#sigma-moe-tiny")
class ProgressiveSparsification(Schedule):
    """K(layer, step): `first[layer]` (1 beyond its end) until share `switch` of `steps`, `then` in every layer after it.

    Made for the k of a router whose weights are not renormalised (topk with convention "softmax"), so that the scale of the
    output does not jump and K = 1 keeps a task gradient. The layer is the MoE layer's number, as the host counts.
    """

    def __init__(
        self,
        first: Sequence[int] = (8, 8, 6, 6, 4, 4, 2, 2),
        then: int = 1,
        steps: int = 1000,
        switch: float = 0.9,
    ):
        if not 0 <= switch <= 1:
            raise BadInput(f"switch={switch} is a share of training: between 0 and 1")
        self.first, self.then, self.at = list(first), then, round(switch * steps)

    def value(self, step: int, layer: int = 0) -> float:
        return self.first[layer] if step < self.at and layer < len(self.first) else self.then

    @property
    def low(self) -> float:
        return min([self.then, *self.first])

    @property
    def high(self) -> float:
        return max([self.then, *self.first])
