"""A memory of values: every expert is one vector, behind a gate and a projection that all share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moesaic.core.registry import register
from moesaic.core.routing import Dispatch
from moesaic.experts.bank import ExpertBank


@register("experts", "product_key", paper="2508.15099", card="layers-and-balancing.md#hydra")
class ProductKeyMemory(ExpertBank):
    """y = sigmoid(g . x) * P sum_e w_e v_e: values of `width` (128), projected once per token and gated by it.

    `cost_E` is what one more value costs (weigh and add); the projection's 2 width dim are paid once per token.
    """

    stacked = ("value_EV",)

    def __init__(self, dim: int, experts: int, width: int | None = None):
        super().__init__(dim, experts)
        width = 128 if width is None else width
        self.value_EV = nn.Parameter(torch.empty(experts, width).normal_(std=width**-0.5))
        self.out_DV = nn.Parameter(torch.empty(dim, width).normal_(std=width**-0.5))
        self.gate_D = nn.Parameter(torch.zeros(dim))

    @property
    def cost_E(self) -> Tensor:
        return torch.full((self.num_experts,), 2.0 * self.value_EV.shape[1])

    @property
    def bytes_E(self) -> Tensor:
        """A value's bytes and its share of the gate and the projection."""
        total = sum(p.numel() * p.element_size() for p in self.parameters())
        return torch.full((self.num_experts,), total / self.num_experts, dtype=torch.float64)

    def forward(self, x_SD: Tensor, offsets_E1: Tensor) -> Tensor:
        value_SV = torch.repeat_interleave(self.value_EV, offsets_E1.diff(), dim=0)
        return self._finish(x_SD, value_SV)

    def run(self, x_TD: Tensor, dispatch: Dispatch, memo: dict[str, Any] | None = None) -> Tensor:
        return self._finish(x_TD, dispatch.combine(self.value_EV[dispatch.expert_S]))

    def _finish(self, x_TD: Tensor, value_TV: Tensor) -> Tensor:
        return torch.sigmoid(x_TD @ self.gate_D).unsqueeze(-1) * linear(value_TV, self.out_DV)
