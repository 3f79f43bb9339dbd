"""Weighted frequency: drop the experts that were given the least weight in all."""

from __future__ import annotations

from torch import Tensor

from moesaic.core.registry import register
from moesaic.surgery.layer import Layer
from moesaic.surgery.scored import Scored

CARD = "surgery-and-steering.md#one-shot-expert-scores"


@register("prune", "weighted_frequency", paper="2510.13999", card=CARD, exact=False, needs={"R0"})
class WeightedFrequency(Scored):
    """The sum of g_e over the tokens that chose e, per token of the text; g as it multiplied the expert's output."""

    def score(self, layer: Layer) -> Tensor:
        statistics = layer.statistics
        return statistics["gate_sum"] / statistics["token_count"].clamp(min=1)
