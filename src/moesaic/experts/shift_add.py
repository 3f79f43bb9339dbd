"""ShiftAddViT's bank: MLPs that multiply and MLPs that only shift."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.experts.bank import ExpertBank
from moesaic.experts.mlp import Mlp

LOWEST = -14


class _Through(torch.autograd.Function):
    """A rounded value forwards, the gradient of the unrounded one backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def shift_weight(shift: Tensor, sign: Tensor) -> Tensor:
    """sign(round(sign)) * 2^round(shift), shift clamped to [-14, 0]: gradients pass the rounding, not the clamp."""
    kept = shift.clamp(LOWEST, 0)
    power = torch.exp2(_Through.apply(kept, kept.round()))
    return _Through.apply(sign, sign.round().sign()) * power


def to_shift(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(shift, sign) of the nearest power of two in the log: at most sqrt(2) - 1 = 41.4 % off. 0 has sign 0."""
    shift = weight.abs().clamp(min=2.0**LOWEST).log2().round().clamp(LOWEST, 0)
    return shift, weight.sign()


def fixed_point(x: Tensor) -> Tensor:
    """16.16 fixed point: multiples of 2^-16 within 2^15, as far as float32 tells them apart; straight-through."""
    kept = x.float().clamp(-(2.0**15), 2.0**15 - 2.0**-16)
    return _Through.apply(kept, (kept * 65536).round() / 65536).to(x.dtype)


@register("experts", "shift_add", paper="2306.06446", card="layers-and-balancing.md#shiftaddvit")
class ShiftAdd(ExpertBank):
    """Multiplying MLPs first, then `shifts` shifting ones (default half): y = W2 gelu(W1 x), their W signed powers of two.

    A shift expert keeps exponent and sign as trained numbers; deployed they are 6 bits a weight. `cost_E` counts its
    additions alone, half of what multiplying costs; `latency_E` (6 and 4, the released weights) is what the balance
    loss `latency` should be given, from the target device where it is known. `convert` makes one from an MLP's weights.
    """

    def __init__(
        self,
        dim: int,
        experts: int = 2,
        width: int | None = None,
        shifts: int | None = None,
        latency: tuple[float, float] = (6.0, 4.0),
    ):
        super().__init__(dim, experts)
        shifts = experts // 2 if shifts is None else shifts
        if not 0 <= shifts < experts or min(latency) <= 0:
            raise BadInput(f"shifts={shifts} of {experts} experts, latency={latency}: at least one must multiply")
        width = dim if width is None else width
        self.width, self.latency = width, latency
        self.mult = Mlp(dim, experts - shifts, width)
        like = Mlp(dim, max(shifts, 1), width)
        for name, start in (("in", like.in_EID), ("out", like.out_EDI)):
            for part, value in zip(("shift", "sign"), to_shift(start.detach()[:shifts]), strict=True):
                setattr(self, f"{name}_{part}", nn.Parameter(value))

    @property
    def shifts_E(self) -> Tensor:
        """True for experts that shift, bool [E]."""
        return torch.arange(self.num_experts) >= len(self.mult)

    @property
    def cost_E(self) -> Tensor:
        return torch.where(self.shifts_E, 2.0, 4.0) * self.dim * self.width

    @property
    def latency_E(self) -> Tensor:
        return torch.where(self.shifts_E, self.latency[1], self.latency[0])

    def forward(self, x_SD: Tensor, offsets_E1: Tensor) -> Tensor:
        mult = len(self.mult)
        bounds = offsets_E1[mult:].tolist()
        parts = [self.mult(x_SD[: bounds[0]], offsets_E1[: mult + 1])]
        for s, (start, end) in enumerate(itertools.pairwise(bounds)):
            if start < end:
                parts.append(self._shift(s, x_SD[start:end]))
        return torch.cat(parts)

    def _shift(self, s: int, x_SD: Tensor) -> Tensor:
        w = self.peek(len(self.mult) + s)
        inner_SI = gelu(linear(fixed_point(x_SD), shift_weight(w["in_shift"], w["in_sign"])))
        return linear(fixed_point(inner_SI), shift_weight(w["out_shift"], w["out_sign"]))

    @torch.no_grad()
    def convert(self, e: int, in_ID: Tensor, out_DI: Tensor) -> None:
        """Make shift expert e from an MLP's two matrices, exactly where they are signed powers of two in [2^-14, 1]."""
        parts = {}
        for name, weight in (("in", in_ID), ("out", out_DI)):
            parts[f"{name}_shift"], parts[f"{name}_sign"] = to_shift(weight)
        self[e] = parts

    def peek(self, e: int) -> dict[str, Tensor]:
        self._check(e)
        e %= self.num_experts
        if e < len(self.mult):
            return self.mult.peek(e)
        names = ("in_shift", "in_sign", "out_shift", "out_sign")
        return {name: getattr(self, name)[e - len(self.mult)] for name in names}
