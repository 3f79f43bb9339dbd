"""Gate mass: drop the experts to which the router gives the least probability."""

from __future__ import annotations

from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.layer import Layer
from moesaic.surgery.scored import Scored

CARD = "surgery-and-steering.md#one-shot-expert-scores"


@register("prune", "gate_mass", paper="2406.02500", card=CARD, exact=False, needs={"R0"})
class GateMass(Scored):
    """The mean over all tokens of p_e: the full softmax of the logits, or the weights of the chosen experts alone.

    Sums over tokens are divided by tokens. (The released running mean divides by batches of samples, which matters for
    one ranking over layers of unequal lengths.)

    Args:
        keep: experts that stay: a share, or a number per layer.
        scope: "uniform" (the paper's layerwise) or "global" (one ranking of the whole model).
        of: "softmax" (as released for Mixtral and Qwen) or "chosen" (top-k weights, as for DeepSeek; for routers that
            score by sigmoid this is the one that means something).
    """

    def __init__(self, keep: float | int = 0.5, scope: str = "uniform", of: str = "softmax") -> None:
        super().__init__(keep, scope)
        if of not in ("softmax", "chosen"):
            raise BadInput(f"of {of!r}: softmax or chosen")
        self.of = of

    def score(self, layer: Layer) -> Tensor:
        statistics = layer.statistics
        if self.of == "softmax":
            return statistics.mean("probability")
        return statistics["gate_sum"] / statistics["token_count"].clamp(min=1)
