"""Weight norm: drop the experts of the smallest weights."""

from __future__ import annotations

from torch import Tensor

from moesaic.core.registry import register
from moesaic.surgery.layer import Layer
from moesaic.surgery.scored import Scored
from moesaic.surgery.similarity import weight_gram

CARD = "surgery-and-steering.md#one-shot-expert-scores"


@register("prune", "weight_norm", paper="2504.05586", card=CARD, exact=False)
class WeightNorm(Scored):
    """The Frobenius norm of all of an expert's tensors together. Reads no text."""

    def score(self, layer: Layer) -> Tensor:
        return weight_gram(layer).diagonal().sqrt()
