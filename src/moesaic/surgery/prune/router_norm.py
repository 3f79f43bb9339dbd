"""Router norm: drop the experts whose router row is shortest."""

from __future__ import annotations

from torch import Tensor

from moesaic.core.registry import register
from moesaic.surgery.layer import Layer
from moesaic.surgery.scored import Scored

CARD = "surgery-and-steering.md#one-shot-expert-scores"


@register("prune", "router_norm", paper="2504.05586", card=CARD, exact=False)
class RouterNorm(Scored):
    """The length of the router's row for e. Reads no text; needs a router that is a matrix with a row per expert."""

    reads_rows = True

    def score(self, layer: Layer) -> Tensor:
        return layer.rows_ED.norm(dim=1)
