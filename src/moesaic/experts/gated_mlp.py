"""The gated MLP bank: SwiGLU experts of one width, stacked as transformers stacks them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moesaic.core.registry import register
from moesaic.core.routing import Dispatch
from moesaic.experts.bank import ExpertBank
from moesaic.kernels import expert_mlp


@register("experts", "gated_mlp", paper="2002.05202", card="layers-and-balancing.md#deepseekmoe")
class GatedMLP(ExpertBank):
    """y = down(act(gate x) * up x), E times. `gate_up_EHD` holds gate rows first (H = 2I), `down_EDI` the way back.

    `kernel` names a backend of moesaic.kernels, or lets the dispatcher choose.
    """

    stacked = ("gate_up_EHD", "down_EDI")

    def __init__(self, dim: int, experts: int, width: int | None = None, act: str = "silu", kernel: str = "auto"):
        super().__init__(dim, experts)
        width = dim if width is None else width
        self.act, self.kernel = act, kernel
        self.gate_up_EHD = nn.Parameter(torch.empty(experts, 2 * width, dim).normal_(std=dim**-0.5))
        self.down_EDI = nn.Parameter(torch.empty(experts, dim, width).normal_(std=width**-0.5))

    def forward(self, x_SD: Tensor, offsets_E1: Tensor) -> Tensor:
        return self.run(x_SD, rows_as_tokens(x_SD, offsets_E1))

    def run(self, x_TD: Tensor, dispatch: Dispatch, memo: dict[str, Any] | None = None) -> Tensor:
        return expert_mlp(x_TD, dispatch, self.gate_up_EHD, self.down_EDI, act=self.act, backend=self.kernel)


def rows_as_tokens(x_SD: Tensor, offsets_E1: Tensor) -> Dispatch:
    """A dispatch whose pairs are the rows of x themselves, each with weight 1."""
    pairs = x_SD.shape[0]
    return Dispatch(torch.arange(pairs, device=x_SD.device), x_SD.new_ones(pairs), offsets_E1, pairs)
