"""HMoE's bank: SwiGLU experts of unequal width."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.experts.bank import ExpertBank


def arithmetic_widths(experts: int, mean: int) -> list[int]:
    """Widths in arithmetic progression around `mean`, 9 : 11 : ... : 23 for eight experts; their sum is experts * mean."""
    shares = [experts + 1 + 2 * e for e in range(experts)]
    ends = [round(sum(shares[:e]) * experts * mean / sum(shares)) for e in range(experts + 1)]
    return [max(1, b - a) for a, b in itertools.pairwise(ends)]


@register("experts", "unequal", paper="2408.10681", card="layers-and-balancing.md#hmoe")
class Unequal(ExpertBank):
    """Expert e is a SwiGLU of width widths[e]; `cost_E` tells balancers and schedulers. Default: arithmetic widths.

    Each expert keeps its own parameters, so nothing is padded to the widest; they do not share a shape to merge in.
    """

    def __init__(self, dim: int, experts: int, width: int | None = None, widths: Sequence[int] | None = None):
        super().__init__(dim, experts)
        widths = arithmetic_widths(experts, dim if width is None else width) if widths is None else list(widths)
        if len(widths) != experts or min(widths) < 1:
            raise BadInput(f"widths={widths}: need {experts} positive widths")
        self.widths = widths
        self.gate_up = nn.ParameterList(torch.empty(2 * w, dim).normal_(std=dim**-0.5) for w in widths)
        self.down = nn.ParameterList(torch.empty(dim, w).normal_(std=w**-0.5) for w in widths)

    @property
    def cost_E(self) -> Tensor:
        return torch.tensor([6.0 * self.dim * w for w in self.widths])

    def forward(self, x_SD: Tensor, offsets_E1: Tensor) -> Tensor:
        bounds = offsets_E1.tolist()
        parts = []
        for e, (start, end) in enumerate(itertools.pairwise(bounds)):
            if start < end:
                gate_sI, up_sI = linear(x_SD[start:end], self.gate_up[e]).chunk(2, dim=-1)
                parts.append(linear(silu(gate_sI) * up_sI, self.down[e]))
        return torch.cat(parts) if parts else x_SD.new_zeros(0, self.dim)

    def peek(self, e: int) -> dict[str, Tensor]:
        self._check(e)
        return {"gate_up_HD": self.gate_up[e], "down_DI": self.down[e]}
