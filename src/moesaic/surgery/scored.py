"""Pruners that are a score per expert: one vector [E] of a layer, and the lowest go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moesaic.surgery.layer import Change, Facts, Layer, Method, count_kept
from moesaic.surgery.select import TOGETHER, check_scope, select


class Scored(Method):
    """Base: a subclass gives `score`, which must not depend on the order of the experts.

    Args:
        keep: experts that stay: a share, or a number per layer.
        scope: "uniform" (as many in every layer) or "global" (one ranking of the whole model, so that layers differ).
    """

    drops = True

    def __init__(self, keep: float | int = 0.5, scope: str = "uniform") -> None:
        check_scope(scope)
        self.keep, self.scope = keep, scope
        self.stock = scope == "uniform"
        self.uneven = scope == "global"
        if scope == "global":
            self.together = TOGETHER

    def score(self, layer: Layer) -> Tensor:
        """[E], higher is worth more."""
        raise NotImplementedError

    def plan(self, blocks: Sequence[Facts]) -> list[int]:
        """With one ranking of the whole model, the counts are those of the average layer: their sum is known, no more."""
        return [count_kept(facts, self.keep) for facts in blocks]

    def look(self, layer: Layer) -> Tensor:
        return self.score(layer).double()

    def decide(self, looks: Sequence[Any], blocks: Sequence[Facts]) -> list[Any]:
        return list(zip(looks, select(looks, blocks, self.keep, self.scope), strict=True))

    def change(self, layer: Layer, decision: Any) -> Change:
        score_E, kept = decision
        return Change(kept, scores=score_E)
