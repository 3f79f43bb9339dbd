"""A bank at another scale: every rank of a LoRA is an expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moesaic.core.registry import register
from moesaic.core.routing import Dispatch
from moesaic.experts.bank import ExpertBank


@register("experts", "lora_ranks", paper="2501.15103", card="adapters.md#smora")
class LoraRanks(ExpertBank):
    """Expert i is the rank-1 map b_i a_i^T, scaled by alpha / k (SMoRA with rank_partition = 1).

    A starts Kaiming-uniform, B at 0, so the bank starts as a no-op beside the frozen module that it adapts (give
    that as the layer's `shared`). `frozen(module)` stops its gradients. With every gate 1 and k = r the sum over
    ranks is a plain LoRA of scale alpha / r.
    """

    stacked = ("a_ED", "b_ED")

    def __init__(self, dim: int, experts: int, alpha: float = 16.0, k: int = 8):
        super().__init__(dim, experts)
        self.scale = alpha / k
        self.a_ED = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(experts, dim), a=5**0.5))
        self.b_ED = nn.Parameter(torch.zeros(experts, dim))

    @staticmethod
    def frozen(module: nn.Module) -> nn.Module:
        """The module with its parameters frozen."""
        return module.requires_grad_(False)

    def forward(self, x_SD: Tensor, offsets_E1: Tensor) -> Tensor:
        expert_S = torch.repeat_interleave(torch.arange(self.a_ED.shape[0], device=x_SD.device), offsets_E1.diff())
        inner_S = (x_SD * self.a_ED[expert_S]).sum(-1, keepdim=True)
        return self.scale * inner_S * self.b_ED[expert_S]

    def run(self, x_TD: Tensor, dispatch: Dispatch, memo: dict[str, Any] | None = None) -> Tensor:
        """Two small dense products with the gates between them: cheaper than gathering S rows of A and B."""
        inner_TE = x_TD @ self.a_ED.T
        gate_TE = torch.zeros_like(inner_TE).index_put(
            (dispatch.token_S, dispatch.expert_S), dispatch.weight_S.to(inner_TE.dtype), accumulate=True
        )
        return self.scale * ((inner_TE * gate_TE) @ self.b_ED)
