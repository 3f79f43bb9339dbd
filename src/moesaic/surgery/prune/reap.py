"""REAP: drop the experts whose weighted outputs are small, on average over the tokens routed to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.core.registry import register
from moesaic.surgery.layer import Change, Facts, Layer, Method, best, count_kept


@register("prune", "reap", paper="2510.13999", card="surgery-and-steering.md#reap", exact=False, needs={"R0", "R1"})
class Reap(Method):
    """S_e = the mean of g_e |f_e(x)| over the tokens routed to e, g being the weight that multiplies its output; 0 for none.

    Args:
        keep: experts that stay in every layer: a share, or a number.
        protect: never drop "super experts": those whose largest output entry, in the first 75 % of the layers, exceeds
            the larger of the 99.5 % quantile over all experts and a tenth of the largest.
    """

    def __init__(self, keep: float | int = 0.5, protect: bool = False) -> None:
        self.keep, self.protect = keep, protect

    def plan(self, blocks: Sequence[Facts]) -> list[int]:
        return [count_kept(facts, self.keep) for facts in blocks]

    def look(self, layer: Layer) -> tuple[Tensor, Tensor]:
        return layer.statistics.mean("gated_norm"), layer.statistics["output_max"]

    def decide(self, looks: Sequence[Any], blocks: Sequence[Facts]) -> list[Any]:
        protected: list[list[int]] = [[] for _ in blocks]
        if self.protect:
            peaks = torch.cat([peak_E for _, peak_E in looks]).double()
            bar = max(float(torch.quantile(peaks, 0.995)), float(peaks.max()) / 10)
            for i, (_, peak_E) in enumerate(looks):
                if i < 0.75 * len(blocks):
                    protected[i] = torch.nonzero(peak_E > bar).flatten().tolist()
        return [(score_E, guarded) for (score_E, _), guarded in zip(looks, protected, strict=True)]

    def change(self, layer: Layer, decision: Any) -> Change:
        score_E, guarded = decision
        kept = best(score_E, count_kept(layer.facts, self.keep), layer.facts.groups, guarded)
        return Change(kept, scores=score_E, report={"protected": guarded} if guarded else {})
