"""EAN: drop the experts whose outputs have the smallest norms."""

from __future__ import annotations

from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.layer import Layer
from moesaic.surgery.scored import Scored

CARD = "surgery-and-steering.md#one-shot-expert-scores"


@register("prune", "ean", paper="2504.05586", card=CARD, exact=False, needs={"R0", "R1"})
class Ean(Scored):
    """The expert activation norm |f_e(x)|, unweighted: its mean over the tokens routed to e, or its sum.

    Args:
        keep: experts that stay: a share, or a number per layer.
        scope: "uniform" (as many in every layer) or "global" (one ranking of the whole model).
        over: "mean" or "sum".
    """

    def __init__(self, keep: float | int = 0.5, scope: str = "uniform", over: str = "mean") -> None:
        super().__init__(keep, scope)
        if over not in ("mean", "sum"):
            raise BadInput(f"over {over!r}: mean or sum")
        self.over = over

    def score(self, layer: Layer) -> Tensor:
        return layer.statistics.mean("norm") if self.over == "mean" else layer.statistics["norm_sum"]
