"""Zero-computation experts behind a transformers bank: ids past its last expert are constants, copies, then zeros."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.view import implementation


class CheapExperts(nn.Module):
    """Mixed into the class of a block's experts module, whose parameters keep their names. Card: MoE++.

    Ids [0, E) are the bank's own; then `constants` (a1 x + a2 v, [a1, a2] = softmax(Wc x)), `copies` (x) and zeros. In the
    paper v ~ N(0, 1); behind a trained model it starts at 0, so that an expert nobody has trained adds no noise.
    """

    mix_C2D: nn.Parameter
    vector_CD: nn.Parameter
    copies: int

    def add_cheap(self, dim: int, constants: int, copies: int, dtype: torch.dtype, device: Any) -> None:
        self.mix_C2D = nn.Parameter(torch.empty(constants, 2, dim, dtype=dtype, device=device).normal_(std=dim**-0.5))
        self.vector_CD = nn.Parameter(torch.zeros(constants, dim, dtype=dtype, device=device))
        self.copies = copies

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x_TD, ids_TK, weights_TK = hidden_states, top_k_index, top_k_weights
        own: Any = self
        experts, constants = own.down_proj.shape[0], len(self.mix_C2D)
        here_TK = (ids_TK >= 0) & (ids_TK < experts)
        skips = getattr(own.config, "_experts_implementation", None) == implementation.NAME
        # The bank's own call; `super()` is the class that transformers gave it.
        y_TD = super().forward(x_TD, ids_TK.where(here_TK, -1 if skips else 0), weights_TK * here_TK)
        cheap_TX = x_TD.new_zeros(len(x_TD), constants + self.copies + 1)
        place_TK = (ids_TK - experts).clamp(0, constants + self.copies)  # every zero expert shares the last column
        cheap_TX = cheap_TX.scatter_add(1, place_TK, (weights_TK * (ids_TK >= experts)).to(cheap_TX.dtype))
        mix_TC2 = torch.einsum("td,cmd->tcm", x_TD, self.mix_C2D.to(x_TD.dtype)).float().softmax(-1).to(x_TD.dtype)
        gates_TC = cheap_TX[:, :constants]
        on_x_T1 = (gates_TC * mix_TC2[..., 0]).sum(1, keepdim=True)
        on_x_T1 = on_x_T1 + cheap_TX[:, constants : constants + self.copies].sum(1, keepdim=True)
        return y_TD + on_x_T1 * x_TD + (gates_TC * mix_TC2[..., 1]) @ self.vector_CD.to(x_TD.dtype)


@cache
def cheap_class(own: type) -> type:
    return type(f"Cheap{own.__name__}", (CheapExperts, own), {})
