"""Similarity: drop the experts that have a near copy among the others."""

from __future__ import annotations

from torch import Tensor

from moesaic.core.registry import register
from moesaic.surgery.layer import Layer
from moesaic.surgery.scored import Scored
from moesaic.surgery.similarity import cosines, weight_gram

CARD = "surgery-and-steering.md#one-shot-expert-scores"


@register("prune", "similarity", paper="2504.05586", card=CARD, exact=False)
class Similarity(Scored):
    """Minus the largest cosine between an expert's flattened weights and another's. Reads no text.

    Two copies score alike and may both go: the score looks at pairs, not at what is left.
    """

    def score(self, layer: Layer) -> Tensor:
        near_EE = cosines(weight_gram(layer))
        near_EE.fill_diagonal_(-1)
        return -near_EE.max(1).values
