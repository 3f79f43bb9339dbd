"""AWQ: inner neurons that are active are scaled up before rounding, and their down columns take it back."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.layer import Layer
from moesaic.surgery.rounding import Rounder, round_expert, round_matrix
from moesaic.view.bank import ExpertWeights
from moesaic.view.implementation import has_own_gate


@register(
    "quantize", "awq", paper="2306.00978", card="surgery-and-steering.md#mixed-precision-allocation", exact=False,
    needs={"R1"},
)  # fmt: skip
class Awq(Rounder):
    """Down columns are multiplied by s_j = (mean |h_j|)^alpha / scale and up rows divided by it, which changes nothing before
    rounding where the expert is act(gate) * up: the product with s is then free. alpha is searched per expert for the least
    error of the down product, weighed by the mean of h^2; 0 is among them, so that it is never worse than nearest there.

    The inputs of gate and up come from the stream, which the router and the shared experts read too: nothing is there to take
    a scale back, and these two are rounded to nearest. So are experts that no token chose, and all of an architecture whose
    gate is not act(gate) * up (biased clamps, no gate): its scale cannot pass.

    Args:
        bits: mean bits per weight of an expert, without scales.
        group: weights of a row that share a scale.
        grid: values of alpha tried between 0 and 1.
    """

    def __init__(self, bits: float = 4, group: int = 64, grid: int = 10) -> None:
        super().__init__(bits, group)
        if grid < 1:
            raise BadInput(f"grid {grid}: at least 1")
        self.grid = grid

    def rounded(self, layer: Layer, e: int, bits: int) -> ExpertWeights:
        expert, block = layer.expert(e), layer.block
        if "gate" not in expert or has_own_gate(block.experts) or not float(layer.statistics["selection_count"][e]):
            return round_expert(expert, bits, self.group)
        size_I = layer.statistics.mean("inner_abs")[e].float()
        weight_I = layer.statistics.mean("inner_square")[e].float()
        least, best_I = float("inf"), torch.ones_like(size_I)
        for step in range(self.grid + 1):
            scale_I = scales(size_I, step / self.grid)
            off_DI = round_matrix(expert["down"] * scale_I, bits, self.group) / scale_I - expert["down"]
            error = float((off_DI.square() * weight_I).sum())
            if error < least:
                least, best_I = error, scale_I
        moved = dict(expert)
        moved["down"], moved["up"] = expert["down"] * best_I, expert["up"] / best_I[:, None]
        if "up_bias" in moved:
            moved["up_bias"] = moved["up_bias"] / best_I
        return round_expert(ExpertWeights(moved), bits, self.group)


def scales(size_I: Tensor, alpha: float) -> Tensor:
    """(mean |h|)^alpha, brought to a geometric middle of 1; a dead neuron's is the smallest of the others."""
    live_I = size_I[size_I > 0]
    if alpha == 0 or not len(live_I):
        return torch.ones_like(size_I)
    scale_I = size_I.clamp(min=float(live_I.min())).pow(alpha)
    return scale_I / (scale_I.max() * scale_I.min()).sqrt()
