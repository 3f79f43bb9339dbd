"""Compressed experts behind a transformers bank: only a token's best experts run, on an input that the others rescale.

Shape legend: T tokens, K slots, M slots that run, A = K - M others, D width, I expert inner width, E experts, S pairs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moesaic.view import implementation


class CompressedExperts(nn.Module):
    """Mixed into the class of a block's experts module, whose parameters keep their names. Card: Compressed Experts.

    Of the chosen slots the `main` of largest weight run; each other one is a vector theta_e. The experts see
    x * sum_e a_e theta_e, a the others' weights divided by their sum. With three vectors, gate, up and down have one each:
    theta_ED on the gate's input, theta_up_ED on up's, theta_down_EI on down's.
    """

    theta_ED: nn.Parameter
    main: int
    renormalise_main: bool
    vectors: int

    def add_compressed(self, dim: int, inner: int, main: int, vectors: int, renormalise_main: bool) -> None:
        like: Any = self.down_proj
        ones = {"theta_ED": dim} | ({"theta_up_ED": dim, "theta_down_EI": inner} if vectors == 3 else {})
        for name, width in ones.items():
            parameter = nn.Parameter(torch.ones(len(like), width, dtype=like.dtype, device=like.device))
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)
        self.main, self.vectors, self.renormalise_main = main, vectors, renormalise_main

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x_TD, own = hidden_states, self
        order_TK = top_k_weights.argsort(stable=True, dim=-1, descending=True)
        ids_TK, weights_TK = top_k_index.gather(1, order_TK), top_k_weights.gather(1, order_TK)
        ids_TM, weights_TM = ids_TK[:, : own.main], weights_TK[:, : own.main]
        ids_TA, weights_TA = ids_TK[:, own.main :], weights_TK[:, own.main :]
        if own.renormalise_main and ids_TA.shape[1]:
            weights_TM = weights_TM / weights_TM.sum(-1, keepdim=True).clamp(min=1e-20)
        if not ids_TA.shape[1]:
            return super().forward(x_TD, ids_TM, weights_TM)
        if own.vectors == 3:
            return self._three(x_TD, ids_TM, weights_TM, ids_TA, weights_TA)
        return super().forward(x_TD * scale(self.theta_ED, ids_TA, weights_TA).to(x_TD.dtype), ids_TM, weights_TM)

    def _three(self, x_TD: Tensor, ids_TM: Tensor, weights_TM: Tensor, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
        """One vector for each projection: the two products of a fused bank then have inputs of their own."""
        own: Any = self
        form = implementation.form_of(own)
        on_gate, on_up, on_h = (
            scale(theta, ids_TA, weights_TA).to(x_TD.dtype) for theta in (own.theta_ED, own.theta_up_ED, own.theta_down_EI)
        )
        y_TD = torch.zeros_like(x_TD)
        for e in range(len(own.down_proj)):
            rows, slots = torch.nonzero(ids_TM == e, as_tuple=True)
            if not len(rows):
                continue
            gate_up = own.gate_up_proj[e]
            half = gate_up.shape[0] // 2
            gate_SI = linear(x_TD[rows] * on_gate[rows], gate_up[:half])
            up_SI = linear(x_TD[rows] * on_up[rows], gate_up[half:])
            h_SI = form.activate(torch.cat([gate_SI, up_SI], -1)) * on_h[rows]
            f_SD = linear(h_SI, own.down_proj[e])
            y_TD = y_TD.index_add(0, rows, (f_SD * weights_TM[rows, slots].unsqueeze(1)).to(y_TD.dtype))
        return y_TD


def scale(theta_ED: Tensor, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    """sum_e a_e theta_e [T, D], float32: as 1 + sum_e a_e (theta_e - 1), so that theta = 1 changes no bit.

    a are the weights over their sum; 0 where that is 0 (no auxiliary expert), and the scale is 1.
    """
    chosen_TA = (ids_TA >= 0) & (ids_TA < len(theta_ED))
    weights_TA = weights_TA.float() * chosen_TA
    share_TA = weights_TA / weights_TA.sum(-1, keepdim=True).clamp(min=1e-20)
    change_TAD = theta_ED.float()[ids_TA.clamp(0, len(theta_ED) - 1)] - 1
    return 1 + (share_TA.unsqueeze(-1) * change_TAD).sum(1)


@cache
def compressed_class(own: Any) -> Any:
    return type(f"Compressed{own.__name__}", (CompressedExperts, own), {})
