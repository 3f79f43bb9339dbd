"""Frequency: drop the experts that were chosen least."""

from __future__ import annotations

from torch import Tensor

from moesaic.core.registry import register
from moesaic.surgery.layer import Layer
from moesaic.surgery.scored import Scored

CARD = "surgery-and-steering.md#one-shot-expert-scores"


@register("prune", "frequency", paper="2510.13999", card=CARD, exact=False, needs={"R0"})
class Frequency(Scored):
    """c_e, the number of tokens that chose e (as the experts were called, not a top-k of the logits).

    As a share of the tokens, so that a ranking over layers is fair where layers saw unequal numbers of them.
    """

    def score(self, layer: Layer) -> Tensor:
        return layer.statistics.frequency_E
