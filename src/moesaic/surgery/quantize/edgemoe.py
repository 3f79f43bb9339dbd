"""EdgeMoE: two widths; as many of the least sensitive experts get the lower one as the tolerated loss allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.kernels.low_bits import GRIDS
from moesaic.surgery.layer import Facts, Layer
from moesaic.surgery.measured import output_error
from moesaic.surgery.rounding import WHOLE, Rounder, round_expert

ERRORS = ("moments", "features")


@register(
    "quantize", "edgemoe", paper="2308.14352", card="surgery-and-steering.md#edgemoe", exact=False,
    needs={"R0", "R1", "R2"},
)  # fmt: skip
class EdgeMoe(Rounder):
    """Sensitivity of an expert is what rounding it alone to the lower width does; experts of the whole model in that order, the
    largest number K of the least sensitive ones get the lower width such that the loss stays within `tolerate`.

    Published, sensitivity is a drop of validation accuracy, one run of the model per expert. Here it is the stand-in that the
    card names: the expert's output error times its share of the layer's tokens and its mean gate, relative to the size of
    the outputs of its layer; the model's loss is taken as the sum, over K it can only rise. The upper width is given, not
    searched among uniform settings. Rounding is that of all methods here: scales per group, not per channel, of least squared
    error, so that a weight beyond the last level may be off by more than half a step. The preload predictor and the eviction
    score are cache policies (trace/policies/edgemoe.py) and no surgery.

    Args:
        bits: mean bits per weight, which then says K; 0 to have `tolerate` say it.
        group: weights of a row that share a scale.
        high, low: the two widths.
        tolerate: the mean over layers of the summed errors, relative to the layer's output; 0: all at `high`.
        error: "moments" (tier R2) or "features" (tier C).
    """

    def __init__(
        self, bits: float = 0, group: int = 64, high: int = 8, low: int = 4, tolerate: float = 0.02, error: str = "moments"
    ) -> None:
        known = sorted({*GRIDS, WHOLE})
        if bits and not bits <= WHOLE:
            raise BadInput(f"bits {bits}: a mean of at most {WHOLE}, or 0")
        super().__init__(bits or high, group)
        if bits and self.low != self.high:
            high, low = self.high, self.low
        elif bits:
            high = low = self.low
        if high not in known or low not in known or low > high or tolerate < 0 or error not in ERRORS:
            raise BadInput(f"high {high}, low {low}: of {', '.join(map(str, known))}; tolerate {tolerate}, error {error!r}")
        self.mean, self.tolerate, self.error = bits, tolerate, error
        self.high, self.low, self.widths = high, low, (low, high)
        self.together = "" if low == high else "it gives two widths to the experts of the whole model in one order"

    def look(self, layer: Layer) -> Any:
        if self.low == self.high:
            return None
        found, E = layer.statistics, layer.facts.experts
        share_E, gate_E = found.frequency_E, found.mean("gate")
        size = math.sqrt(float(found["gated_norm_sum"].square().sum()) / float(found["token_count"]) ** 2) or 1.0
        losses = []
        for e in range(E):
            made = round_expert(layer.expert(e), self.low, self.group)
            losses.append(output_error(layer, e, made, self.error) * float(share_E[e] * gate_E[e]) / size)
        return losses

    def allocate(self, looks: Sequence[Any], blocks: Sequence[Facts]) -> list[list[int]]:
        found = [[self.high] * facts.experts for facts in blocks]
        if self.low == self.high:
            return found
        order = sorted((loss, i, e) for i, losses in enumerate(looks) for e, loss in enumerate(losses))
        for _, i, e in order[: self.count([loss for loss, _, _ in order], len(blocks))]:
            found[i][e] = self.low
        return found

    def count(self, losses: Sequence[float], layers: int) -> int:
        """K, of losses in ascending order."""
        if self.mean:
            return math.ceil((self.high - self.mean) / (self.high - self.low) * len(losses) - 1e-9)
        total = 0.0
        for k, loss in enumerate(losses):
            total += loss / layers
            if total > self.tolerate or not self.tolerate:
                return k
        return len(losses)
