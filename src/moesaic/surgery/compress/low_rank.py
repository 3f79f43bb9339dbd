"""Low rank: the truncated SVD of every expert's matrices, one rank for all."""

from __future__ import annotations

from typing import Any

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.factored import Factored, Split, low_rank, moment_of, upright, whitened
from moesaic.surgery.layer import Layer


@register("compress", "low_rank", card="surgery-and-steering.md#sub-moe", exact=False)
class LowRank(Factored):
    """W [B, A] becomes L R of rank keep B A / (B + A): the best of that rank. The baseline of the methods beside it.

    Args:
        keep: share of the experts' bytes that stays.
        store: "factors" (smaller, needs `import moesaic`) or "dense" (multiplied out: stock, and no smaller).
        rank: of every matrix, instead of `keep`; at full rank the weights come back up to rounding.
        whiten: the least error on the expert's own inputs instead of its weights (SVD of W times the Cholesky factor of their
            second moment, tier R2).
    """

    def __init__(self, keep: float = 0.5, store: str = "factors", rank: int | None = None, whiten: bool = False) -> None:
        super().__init__(keep, store)
        if rank is not None and rank < 1:
            raise BadInput(f"rank {rank}: at least 1")
        self.rank, self.whiten = rank, whiten
        if whiten and self.keep < 1:
            self.needs = frozenset({"R0", "R2"})

    def split(self, layer: Layer, side: str, decision: Any) -> Split:
        found = Split()
        for e in range(layer.facts.experts):
            own_BA = upright(layer, e, side)
            rank = min(self.rank or rank_for(self.keep, *own_BA.shape), *own_BA.shape)
            found.add(whitened(own_BA, moment_of(layer, e, side), rank) if self.whiten else low_rank(own_BA, rank))
        return found


def rank_for(keep: float, outputs: int, inputs: int) -> int:
    """The largest rank whose factors take this share of the matrix; at least 1."""
    return max(1, int(keep * outputs * inputs / (outputs + inputs) + 1e-9))
