"""`experts_implementation="moesaic"`: our kernels behind the one experts call of every transformers MoE."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.integrations import moe as transformers_moe

from moesaic.core.routing import Dispatch

NAME = "moesaic"


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts call: x [T, D], ids [T, K] (outside [0, E): empty slot), weights [T, K] -> y [T, D]."""
    dispatch = Dispatch.of_slots(top_k_index, top_k_weights, self.down_proj.shape[0])
    return run(self, hidden_states, dispatch)


def run(experts: Any, x_TD: Tensor, dispatch: Dispatch) -> Tensor:
    """Run a dispatch on a bank as stored: gated or not, biased, transposed, interleaved, own gate, normed output."""
    out_TD = torch.zeros_like(x_TD)
    transposed, biased = experts.is_transposed, experts.has_bias
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    up_EHD, down_EDI = getattr(experts, up_name), experts.down_proj
    apply = experts._apply_gate if experts.has_gate else experts.act_fn
    bounds = dispatch.offsets_E1.tolist()
    for e, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            continue
        token_s = dispatch.token_S[start:end]
        up_bias = getattr(experts, up_name + "_bias")[e] if biased else None
        down_bias = experts.down_proj_bias[e] if biased else None
        h_sH = linear(x_TD[token_s], up_EHD[e].T if transposed else up_EHD[e], up_bias)
        y_sD = linear(apply(h_sH), down_EDI[e].T if transposed else down_EDI[e], down_bias)
        if getattr(experts, "has_post_expert_norm", False):
            y_sD = experts.post_expert_norm(y_sD)
        y_sD = y_sD * dispatch.weight_S[start:end, None]
        out_TD = out_TD.index_add(0, token_s, y_sD.to(out_TD.dtype))
    return out_TD


def register() -> None:
    """Make the name known to transformers; called when `moesaic.view` is imported."""
    transformers_moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
