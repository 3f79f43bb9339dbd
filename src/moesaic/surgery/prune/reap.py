"""REAP: drop the experts whose weighted outputs are small, on average over the tokens routed to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.core.registry import register
from moesaic.surgery.layer import Change, Facts, Layer
from moesaic.surgery.scored import Scored
from moesaic.surgery.select import select


@register("prune", "reap", paper="2510.13999", card="surgery-and-steering.md#reap", exact=False, needs={"R0", "R1"})
class Reap(Scored):
    """S_e = the mean of g_e |f_e(x)| over the tokens routed to e, g being the weight that multiplies its output; 0 for none.

    The released observer takes g from a softmax of the raw logits and the selection from their top-k; here both are what
    the experts were called with, so sigmoid, bias-corrected and group-limited routers are measured as they are.

    Args:
        keep: experts that stay: a share, or a number per layer.
        scope: "uniform" (as many in every layer) or "global" (one ranking of the whole model).
        protect: never drop "super experts": those whose largest output entry, in the first 75 % of the layers, exceeds
            the larger of the 99.5 % quantile over all experts and a tenth of the largest. (The released code takes the
            largest signed entry; here it is the largest absolute one.)
    """

    def __init__(self, keep: float | int = 0.5, scope: str = "uniform", protect: bool = False) -> None:
        super().__init__(keep, scope)
        self.protect = protect
        if protect:
            self.together = self.together or "protect compares the peaks of all layers' experts"

    def score(self, layer: Layer) -> Tensor:
        return layer.statistics.mean("gated_norm")

    def look(self, layer: Layer) -> Any:
        return self.score(layer), layer.statistics["output_max"]

    def decide(self, looks: Sequence[Any], blocks: Sequence[Facts]) -> list[Any]:
        protected = super_experts([peak_E for _, peak_E in looks]) if self.protect else [[] for _ in blocks]
        scores = [score_E for score_E, _ in looks]
        kept = select(scores, blocks, self.keep, self.scope, protected)
        return list(zip(scores, kept, protected, strict=True))

    def change(self, layer: Layer, decision: Any) -> Change:
        score_E, kept, guarded = decision
        return Change(kept, scores=score_E, report={"protected": guarded} if guarded else {})


def super_experts(peaks: Sequence[Tensor]) -> list[list[int]]:
    """Of each layer the experts whose largest output entry [E] is above the bar, see `Reap`; none in the last quarter."""
    every = torch.cat(list(peaks)).double()
    bar = max(float(torch.quantile(every, 0.995)), float(every.max()) / 10)
    return [torch.nonzero(peak_E > bar).flatten().tolist() if i < 0.75 * len(peaks) else [] for i, peak_E in enumerate(peaks)]
