"""Shared experts: S always-on experts, fused into one MLP of S times the width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu


class SharedExperts(nn.Module):
    """y = sum of S SwiGLU experts of width I, as one SwiGLU of width S * I. They never enter a balance loss.

    `gated` multiplies the sum with sigmoid(x w), as Qwen2-MoE does. Card: layers-and-balancing.md, "DeepSeekMoE".
    """

    def __init__(self, dim: int, width: int, count: int = 1, gated: bool = False):
        super().__init__()
        self.count, self.width = count, width
        self.gate_up_HD = nn.Parameter(torch.empty(2 * count * width, dim).normal_(std=dim**-0.5))
        self.down_DI = nn.Parameter(torch.empty(dim, count * width).normal_(std=width**-0.5))
        self.gate_D = nn.Parameter(torch.zeros(dim)) if gated else None

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TI, up_TI = linear(x_TD, self.gate_up_HD).chunk(2, dim=-1)
        y_TD = linear(silu(gate_TI) * up_TI, self.down_DI)
        return y_TD if self.gate_D is None else y_TD * torch.sigmoid(x_TD @ self.gate_D).unsqueeze(-1)
