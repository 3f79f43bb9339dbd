"""Weighted EAN: drop the experts that added least to the stream in all: the sum of weight times norm."""

from __future__ import annotations

from torch import Tensor

from moesaic.core.registry import register
from moesaic.surgery.layer import Layer
from moesaic.surgery.scored import Scored

CARD = "surgery-and-steering.md#one-shot-expert-scores"


@register("prune", "weighted_ean", paper="2510.13999", card=CARD, exact=False, needs={"R0", "R1"})
class WeightedEan(Scored):
    """The sum of g_e |f_e(x)| over the tokens routed to e: REAP's score times how often the expert is used."""

    def score(self, layer: Layer) -> Tensor:
        return layer.statistics["gated_norm_sum"]
