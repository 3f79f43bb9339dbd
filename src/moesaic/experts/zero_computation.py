"""MoE++'s bank: FFN experts, then constants, copies and zeros that cost almost nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.experts.bank import ExpertBank
from moesaic.experts.gated_mlp import GatedMLP


@register("experts", "zero_computation", paper="2410.07348", card="layers-and-balancing.md#moe++")
class ZeroComputation(ExpertBank):
    """Expert order: FFN, constants, copies, zeros. Zero: 0. Copy: x. Constant: a1 x + a2 v, [a1, a2] = softmax(Wc x).

    Defaults follow the paper: 1 zero, 1 copy, max(FFN / 4 - 2, 1) constants.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        width: int | None = None,
        constants: int = 1,
        copies: int = 1,
        zeros: int = 1,
    ):
        super().__init__(dim, experts)
        ffn = experts - constants - copies - zeros
        if ffn < 1:
            raise BadInput(f"experts={experts} leaves no FFN beside {constants} constants, {copies} copies and {zeros} zeros")
        self.constants, self.copies, self.zeros = constants, copies, zeros
        self.ffn = GatedMLP(dim, ffn, width)
        self.mix_C2D = nn.Parameter(torch.empty(constants, 2, dim).normal_(std=dim**-0.5))
        self.vector_CD = nn.Parameter(torch.randn(constants, dim))

    @property
    def cost_E(self) -> Tensor:
        cheap = [4.0 * self.dim] * self.constants + [0.0] * (self.copies + self.zeros)
        return torch.cat([self.ffn.cost_E, torch.tensor(cheap)])

    @property
    def cheap_E(self) -> Tensor:
        """True for zero-computation experts, bool [E]: what the weighted balance loss asks for."""
        return torch.arange(self.num_experts) >= len(self.ffn)

    def forward(self, x_SD: Tensor, offsets_E1: Tensor) -> Tensor:
        ffn = len(self.ffn)
        bounds = offsets_E1[ffn:].tolist()
        parts = [self.ffn(x_SD[: bounds[0]], offsets_E1[: ffn + 1])]
        for c in range(self.constants):
            x_sD = x_SD[bounds[c] : bounds[c + 1]]
            mix_s2 = (x_sD @ self.mix_C2D[c].T.to(x_sD.dtype)).float().softmax(-1).to(x_sD.dtype)
            parts.append(mix_s2[:, :1] * x_sD + mix_s2[:, 1:] * self.vector_CD[c].to(x_sD.dtype))
        parts.append(x_SD[bounds[self.constants] : bounds[self.constants + self.copies]])
        parts.append(torch.zeros_like(x_SD[bounds[self.constants + self.copies] :]))
        return torch.cat(parts)

    def peek(self, e: int) -> dict[str, Tensor]:
        self._check(e)
        e %= self.num_experts
        if e < len(self.ffn):
            return self.ffn.peek(e)
        c = e - len(self.ffn)
        return {"mix_2D": self.mix_C2D[c], "vector_D": self.vector_CD[c]} if c < self.constants else {}
