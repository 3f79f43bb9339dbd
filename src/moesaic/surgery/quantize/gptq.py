"""GPTQ: columns are rounded one after another, and what each loses is made up for in those that follow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.kernels.low_bits import choose_codes
from moesaic.surgery.layer import Layer
from moesaic.surgery.rounding import Rounder, on_scales, round_expert, spread
from moesaic.surgery.seen import seen
from moesaic.view.bank import ExpertWeights

TOKENS = ("routed", "gated", "all")


@register(
    "quantize",
    "gptq",
    paper="2210.17323",
    card="surgery-and-steering.md#mixed-precision-allocation",
    exact=False,
    needs={"R0", "R2"},
)
class Gptq(Rounder):
    """Least error on the inputs of each expert, gate and up by the second moment of x, down by that of h (of the expert as it
    was). An expert with fewer than `least` tokens is rounded to nearest instead. Published, a layer's inputs are those that the
    layers before it give once they are rounded: with `sequential`; without, they are the untouched model's.

    Args:
        bits: mean bits per weight of an expert, without scales.
        group: weights of a row that share a scale.
        tokens: whose inputs count: "routed" (those that chose the expert, tier R2), "gated" (the same, each by its weight),
            "all" (every token for every expert: no expert is left out, but unrouted tokens count as much). The last two read
            features (tier C), over which experts run again; the model's own output is not touched.
        least: tokens that an expert must have seen.
        damp: of the mean diagonal, added to the diagonal.
    """

    def __init__(self, bits: float = 4, group: int = 64, tokens: str = "routed", least: int = 32, damp: float = 0.01) -> None:
        super().__init__(bits, group)
        if tokens not in TOKENS or least < 0 or damp <= 0:
            raise BadInput(f"tokens {tokens!r}: one of {', '.join(TOKENS)}; least {least}: not below 0; damp {damp}: above 0")
        self.tokens, self.least, self.damp = tokens, least, damp
        if tokens != "routed":
            self.needs = frozenset({"C"})

    def rounded(self, layer: Layer, e: int, bits: int) -> ExpertWeights:
        expert = layer.expert(e)
        first_AA, down_AA, count = self.moments(layer, e)
        if count < self.least:
            return round_expert(expert, bits, self.group)
        found = dict(expert)
        for names, moment_AA in ((("gate", "up"), first_AA), (("down",), down_AA)):
            factor_AA = inverse_factor(moment_AA, self.damp)
            for name in names:
                if name in found:
                    found[name] = compensated(found[name], factor_AA, bits, self.group)
        return ExpertWeights({name: found[name] for name in expert})

    def moments(self, layer: Layer, e: int) -> tuple[Tensor, Tensor, int]:
        """Sums of x x^T and of h h^T over the tokens that count, float64, and how many there were."""
        if self.tokens == "routed":
            found, count = layer.statistics, int(layer.statistics["selection_count"][e])
            return found["input_gram_sum"][e].double(), found["inner_gram_sum"][e].double(), count
        rows = seen(layer)
        x_SD, weight_S = (rows.x_TD, None) if self.tokens == "all" else rows.of(e)
        h_SI = layer.run(e, x_SD)[0].double()
        x_SD = x_SD.double()
        scale_S1: Tensor | float = 1.0 if weight_S is None else weight_S.double()[:, None]
        return x_SD.T @ (x_SD * scale_S1), h_SI.T @ (h_SI * scale_S1), len(x_SD)


def inverse_factor(moment_AA: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor of the damped moment's inverse, float32; an input that is always zero counts for nothing."""
    moment_AA = moment_AA.clone()
    size = float(moment_AA.diagonal().mean())
    moment_AA.diagonal().add_(damp * size if size > 0 else 1.0)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment_AA)), upper=True).float()


def compensated(
    weight_BA: Tensor, factor_AA: Tensor, bits: int, group: int, rounding: Callable[..., Tensor] = on_scales
) -> Tensor:
    """The rounded matrix [B, A]. Scales are those of the untouched weights, so that the grid is one that can be packed."""
    _, scale_BG = choose_codes(weight_BA.float(), bits, group)
    scale_BA = spread(scale_BG.float(), group, weight_BA.shape[1])
    left_BA, made_BA = weight_BA.float().clone(), torch.empty_like(weight_BA, dtype=torch.float32)
    for low in range(0, weight_BA.shape[1], group):
        high = min(low + group, weight_BA.shape[1])
        loss_Bg = torch.empty(len(left_BA), high - low)
        for a in range(low, high):
            made_BA[:, a] = rounding(left_BA[:, a], scale_BA[:, a], bits)
            loss_Bg[:, a - low] = (left_BA[:, a] - made_BA[:, a]) / factor_AA[a, a]
            left_BA[:, a + 1 : high] -= torch.outer(loss_Bg[:, a - low], factor_AA[a, a + 1 : high])
        left_BA[:, high:] -= loss_Bg @ factor_AA[low:high, high:]
    return made_BA
