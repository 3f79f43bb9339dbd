"""AdaptDHM's bank: every expert's weights are shared ones times its own."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moesaic.core.registry import register
from moesaic.experts.bank import ExpertBank


@register("experts", "weight_product", paper="2211.12105", card="routing.md#adaptdhm")
class WeightProduct(ExpertBank):
    """y = W2 relu(W1 x + b1) + b2 with W = W_shared * W_e elementwise and b = b_shared + b_e. Matrices start as Xavier's.

    The released towers declare their biases and leave them out; here they count. One layer of the tower is the bank's two
    matrices; the sigmoid at a tower's end belongs to its task. Shared weights count in equal shares in `bytes_E`.
    """

    stacked = ("in_EID", "in_bias_EI", "out_EDI", "out_bias_ED")

    def __init__(self, dim: int, experts: int, width: int | None = None):
        super().__init__(dim, experts)
        width = dim if width is None else width
        self.in_EID, self.out_EDI = _xavier(experts, width, dim), _xavier(experts, dim, width)
        self.in_bias_EI, self.out_bias_ED = nn.Parameter(torch.zeros(experts, width)), nn.Parameter(torch.zeros(experts, dim))
        self.in_ID, self.out_DI = nn.Parameter(_xavier(1, width, dim)[0]), nn.Parameter(_xavier(1, dim, width)[0])
        self.in_bias_I, self.out_bias_D = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(dim))

    @property
    def cost_E(self) -> Tensor:
        """Two products per token; the weights are multiplied once per call."""
        return torch.full((self.num_experts,), 4.0 * self.in_ID.numel())

    @property
    def bytes_E(self) -> Tensor:
        shared = sum(p.numel() * p.element_size() for p in (self.in_ID, self.out_DI, self.in_bias_I, self.out_bias_D))
        return super().bytes_E + shared / self.num_experts

    def forward(self, x_SD: Tensor, offsets_E1: Tensor) -> Tensor:
        parts = []
        for e, (start, end) in enumerate(itertools.pairwise(offsets_E1.tolist())):
            if start < end:
                inner = linear(x_SD[start:end], self.in_ID * self.in_EID[e], self.in_bias_I + self.in_bias_EI[e])
                parts.append(linear(inner.relu(), self.out_DI * self.out_EDI[e], self.out_bias_D + self.out_bias_ED[e]))
        return torch.cat(parts) if parts else x_SD.new_zeros(0, self.dim)


def _xavier(experts: int, rows: int, columns: int) -> nn.Parameter:
    """Stacked matrices with Glorot's normal start."""
    return nn.Parameter(torch.randn(experts, rows, columns) * (2 / (rows + columns)) ** 0.5)
