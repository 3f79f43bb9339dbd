"""The naive twin: the definition of a bank of gated (or plain) MLP experts, in plain autograd PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from moesaic.core.routing import Dispatch


def expert_mlp(
    x_TD: Tensor, dispatch: Dispatch, gate_up_EHD: Tensor, down_EDI: Tensor, act: Callable[[Tensor], Tensor], gated: bool = True
) -> Tensor:
    """y_t = sum over t's pairs of weight * down_e(act(gate_e x) * up_e x); H is 2I (gate rows first) or I if not gated."""
    out_TD = torch.zeros_like(x_TD)
    bounds = dispatch.offsets_E1.tolist()
    for e, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if start == end:
            continue
        token_s = dispatch.token_S[start:end]
        h_sH = linear(x_TD[token_s], gate_up_EHD[e])
        if gated:
            gate_sI, up_sI = h_sH.chunk(2, dim=-1)
            a_sI = act(gate_sI) * up_sI
        else:
            a_sI = act(h_sH)
        y_sD = linear(a_sI, down_EDI[e]) * dispatch.weight_S[start:end, None].to(x_TD.dtype)
        out_TD = out_TD.index_add(0, token_s, y_sD)
    return out_TD
