"""HQQ: scales and zero points by half-quadratic splitting, without calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.kernels.low_bits import choose_codes, levels_of
from moesaic.surgery.layer import Layer
from moesaic.surgery.rounding import MATRICES, Rounder, spread
from moesaic.view.bank import ExpertWeights


@register("quantize", "hqq", card="surgery-and-steering.md#mixed-precision-allocation", exact=False)
class Hqq(Rounder):
    """minimise |W - Q(W)|_p^p + beta/2 |W_e - (W - Q(W))|^2 over what the grid leaves to choose, p < 1: a few large weights may
    be off, most are not. The sparse part W_e is shrunk in closed form, then the grid is fitted to W - W_e.

    Published, the scale is fixed and the zero point fitted. Packed records hold no zero point, so by default the scale is what
    is fitted, by least squares on the codes; with `zero` it is as published, and the result cannot be packed.

    Args:
        bits: mean bits per weight of an expert, without scales.
        group: weights of a row that share a scale.
        zero: a zero point per group.
        p: of the norm. beta, kappa: its weight, and how it grows per step.
        steps: at most.
    """

    def __init__(
        self, bits: float = 4, group: int = 64, zero: bool = False, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01,
        steps: int = 20,
    ) -> None:  # fmt: skip
        super().__init__(bits, group)
        if not 0 < p <= 1 or beta <= 0 or kappa < 1 or steps < 0:
            raise BadInput(f"p {p}: above 0 and at most 1; beta {beta}: above 0; kappa {kappa}: at least 1; steps {steps}")
        self.zero, self.p, self.beta, self.kappa, self.steps = zero, p, beta, kappa, steps
        self.on_grid = not zero

    def rounded(self, layer: Layer, e: int, bits: int) -> ExpertWeights:
        fit = self.with_zero if self.zero else self.without_zero
        return ExpertWeights({n: fit(t.float(), bits) if n in MATRICES else t for n, t in layer.expert(e).items()})

    def shrunk(self, off: Tensor, beta: float) -> Tensor:
        """The sparse part: what of the error the norm lets stand."""
        size = off.abs()
        return off.sign() * (size - size.clamp(min=1e-8).pow(self.p - 1) / beta).clamp(min=0)

    def without_zero(self, weight_BA: Tensor, bits: int) -> Tensor:
        """Fit scales only. Each is rounded to bf16, as it would be stored."""
        A, beta = weight_BA.shape[1], self.beta
        _, scale_BG = choose_codes(weight_BA, bits, self.group)
        scale_BA = spread(scale_BG.float(), self.group, A)
        best_BA = levels_of(weight_BA, scale_BA, bits) * scale_BA
        least_BG = self.norm(weight_BA - best_BA)
        for _ in range(self.steps):
            levels_BA = levels_of(weight_BA, scale_BA, bits)
            target_BA = weight_BA - self.shrunk(weight_BA - levels_BA * scale_BA, beta)
            new_BG = self.sums(target_BA * levels_BA) / self.sums(levels_BA.square()).clamp(min=1e-8)
            scale_BA = spread(new_BG.bfloat16().float(), self.group, A)
            tried_BA = levels_of(weight_BA, scale_BA, bits) * scale_BA
            norm_BG = self.norm(weight_BA - tried_BA)
            better_BG = norm_BG < least_BG
            if not bool(better_BG.any()):
                break
            best_BA = torch.where(spread(better_BG, self.group, A), tried_BA, best_BA)
            least_BG = torch.minimum(norm_BG, least_BG)
            beta *= self.kappa
        return best_BA

    def with_zero(self, weight_BA: Tensor, bits: int) -> Tensor:
        """Fit zero points; the scale spans the group."""
        A, beta, top = weight_BA.shape[1], self.beta, 2**bits - 1
        low_BG, high_BG = -self.largest(-weight_BA), self.largest(weight_BA)
        scale_BG = ((high_BG - low_BG) / top).clamp(min=1e-8)
        scale_BA, zero_BG = spread(scale_BG, self.group, A), -low_BG / scale_BG
        best_BA, least_BG = weight_BA, torch.full_like(scale_BG, torch.inf)
        for _ in range(self.steps + 1):
            zero_BA = spread(zero_BG, self.group, A)
            codes_BA = (weight_BA / scale_BA + zero_BA).round().clamp(0, top)
            tried_BA = (codes_BA - zero_BA) * scale_BA
            norm_BG = self.norm(weight_BA - tried_BA)
            better_BG = norm_BG < least_BG
            if not bool(better_BG.any()):
                break
            best_BA = torch.where(spread(better_BG, self.group, A), tried_BA, best_BA)
            least_BG = torch.minimum(norm_BG, least_BG)
            sparse_BA = self.shrunk(weight_BA - tried_BA, beta)
            counts_BG = self.sums(torch.ones_like(weight_BA))
            zero_BG = self.sums(codes_BA - (weight_BA - sparse_BA) / scale_BA) / counts_BG
            beta *= self.kappa
        return best_BA

    def norm(self, off_BA: Tensor) -> Tensor:
        """|.|_p^p of every group [B, G]."""
        return self.sums(off_BA.abs().pow(self.p))

    def sums(self, values_BA: Tensor) -> Tensor:
        return torch.stack([part.sum(1) for part in values_BA.split(self.group, 1)], 1)

    def largest(self, values_BA: Tensor) -> Tensor:
        return torch.stack([part.amax(1) for part in values_BA.split(self.group, 1)], 1)
