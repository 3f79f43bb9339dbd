"""The adapter bank: bottleneck MLPs with biases, the experts that SMEAR merges."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.experts.bank import ExpertBank

ACTS: dict[str | None, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu": gelu, None: lambda h: h}


@register("experts", "adapter", paper="2306.03745", card="routing.md#smear")
class Adapter(ExpertBank):
    """y = up(act(down x + b1)) + b2 with a bottleneck of max(dim / 32, 24); the residual is the host's.

    Weights start at N(0, 0.01^2), biases at 0. `act=None` makes the experts linear, where merging parameters equals
    mixing outputs. `std` sets the start of both weights; with `zero_start` the way up starts at 0, and the bank as a no-op.
    """

    stacked = ("down_EID", "down_bias_EI", "up_EDI", "up_bias_ED")

    def __init__(
        self,
        dim: int,
        experts: int,
        width: int | None = None,
        act: Literal["silu", "gelu"] | None = "silu",
        std: float = 0.01,
        zero_start: bool = False,
    ):
        super().__init__(dim, experts)
        if act not in ACTS:
            raise BadInput(f"act={act!r}: one of silu, gelu, or none")
        width = max(dim // 32, 24) if width is None else width
        self.act = act
        self.down_EID = nn.Parameter(torch.empty(experts, width, dim).normal_(std=std))
        self.down_bias_EI = nn.Parameter(torch.zeros(experts, width))
        self.up_EDI = nn.Parameter(torch.empty(experts, dim, width).normal_(std=0.0 if zero_start else std))
        self.up_bias_ED = nn.Parameter(torch.zeros(experts, dim))

    def forward(self, x_SD: Tensor, offsets_E1: Tensor) -> Tensor:
        bounds = offsets_E1.tolist()
        parts = []
        for e, (s, t) in enumerate(itertools.pairwise(bounds)):
            if s < t:
                h_sI = linear(x_SD[s:t], self.down_EID[e], self.down_bias_EI[e])
                parts.append(linear(ACTS[self.act](h_sI), self.up_EDI[e], self.up_bias_ED[e]))
        return torch.cat(parts) if parts else x_SD.new_zeros(0, self.dim)
