"""MoE-I², stage 2: low rank, with ranks shared out among a layer's experts by their importance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.budget import apportion
from moesaic.surgery.factored import Factored, Split, low_rank, upright
from moesaic.surgery.layer import Change, Layer
from moesaic.surgery.reconstruct import Reconstruction

IMPORTANCE = ("masked", "uniform")


@register("compress", "moe_i2", paper="2411.01016", card="surgery-and-steering.md#moe-i2", exact=False, needs={"C"})
class MoeI2Ranks(Factored):
    """Rank of expert e in proportion to what the layer's output loses when e cannot be chosen; the ranks of a layer's
    product sum to their budget exactly (largest remainder, none above full rank, `least` for all).

    The paper's importance is the rise of the loss; here it is the rise of the layer's own output error (tier C), the same
    stand-in as in stage 1 (`moesaic prune --method moe_i2`), because one layer is in memory at a time. Both stages as
    published, with layers of unequal size between them, are `recipes/moe-i2.yaml`. LoRA fine-tuning is left to `moesaic train`.

    Args:
        keep: share of the experts' bytes that stays.
        store: "factors" (smaller, needs `import moesaic`) or "dense" (multiplied out: stock, and no smaller).
        importance: "masked" (measured) or "uniform".
        floor: share of its even rank that the least important expert keeps.
        tokens: tokens to compare on.
    """

    def __init__(
        self, keep: float = 0.5, store: str = "factors", importance: str = "masked", floor: float = 0.25, tokens: int = 1024
    ) -> None:
        super().__init__(keep, store)
        if importance not in IMPORTANCE:
            raise BadInput(f"importance {importance!r}: one of {', '.join(IMPORTANCE)}")
        if not 0 <= floor <= 1 or tokens < 1:
            raise BadInput(f"floor {floor}: from 0 to 1; tokens {tokens}: at least 1")
        self.importance, self.floor, self.tokens = importance, floor, tokens

    def look(self, layer: Layer) -> list[float]:
        E = layer.facts.experts
        if self.importance == "uniform" or self.keep == 1:
            return [1.0] * E
        output = Reconstruction(layer, self.tokens)
        return [output.error((e,)) for e in range(E)]

    def change(self, layer: Layer, decision: Any) -> Change:
        change = super().change(layer, decision)
        change.scores = torch.tensor(decision, dtype=torch.float64)
        return change

    def split(self, layer: Layer, side: str, decision: Any) -> Split:
        E = layer.facts.experts
        B, A = upright(layer, 0, side).shape
        found = Split()
        for e, rank in enumerate(ranks(decision, int(self.keep * E * B * A / (B + A) + 1e-9), min(B, A), self.floor)):
            found.add(low_rank(upright(layer, e, side), rank))
        return found


def ranks(importance: Sequence[float], total: int, full: int, floor: float) -> list[int]:
    """Ranks of the experts, summing to `total` exactly where full ranks allow it."""
    E = len(importance)
    least = min(int(total / E * floor), full)
    total = min(total, E * full)
    return [least + more for more in apportion(total - E * least, list(importance), [full - least] * E)]
