"""The plain MLP bank: two matrices and an activation between, with or without biases."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, relu, silu

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.experts.bank import ExpertBank

ACTS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "relu": relu, "silu": silu, "tanh": torch.tanh}


@register("experts", "mlp", paper="2306.04640", card="layers-and-balancing.md#moduleformer")
class Mlp(ExpertBank):
    """y = W2 act(W1 x + b1) + b2, E times; biases start at zero and exist with `bias=True`."""

    stacked: tuple[str, ...] = ("in_EID", "out_EDI")

    def __init__(
        self,
        dim: int,
        experts: int,
        width: int | None = None,
        act: Literal["gelu", "relu", "silu", "tanh"] = "gelu",
        bias: bool = False,
    ):
        super().__init__(dim, experts)
        if act not in ACTS:
            raise BadInput(f"act={act!r}: one of {', '.join(ACTS)}")
        width = dim if width is None else width
        self.act = act
        self.in_EID = nn.Parameter(torch.empty(experts, width, dim).normal_(std=dim**-0.5))
        self.out_EDI = nn.Parameter(torch.empty(experts, dim, width).normal_(std=width**-0.5))
        self.in_bias_EI = nn.Parameter(torch.zeros(experts, width)) if bias else None
        self.out_bias_ED = nn.Parameter(torch.zeros(experts, dim)) if bias else None
        if bias:
            self.stacked = (*self.stacked, "in_bias_EI", "out_bias_ED")

    def expert(self, e: int, x_SD: Tensor) -> Tensor:
        """Expert e on rows x."""
        inner_SI = linear(x_SD, self.in_EID[e], None if self.in_bias_EI is None else self.in_bias_EI[e])
        return linear(ACTS[self.act](inner_SI), self.out_EDI[e], None if self.out_bias_ED is None else self.out_bias_ED[e])

    def forward(self, x_SD: Tensor, offsets_E1: Tensor) -> Tensor:
        spans = itertools.pairwise(offsets_E1.tolist())
        parts = [self.expert(e, x_SD[s:t]) for e, (s, t) in enumerate(spans) if s < t]
        return torch.cat(parts) if parts else x_SD.new_zeros(0, self.dim)
