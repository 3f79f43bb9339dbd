"""The naive twin: the definition of a bank of MLP experts, one expert at a time, in plain autograd PyTorch."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.functional import linear

from moesaic.core.registry import register
from moesaic.core.routing import Dispatch
from moesaic.kernels.weights import Weights, compute_dtype


@register("kernels", "reference", card="benchmarks.md#moe-layer", devices="any", training=True)
def reference(x_TD: Tensor, dispatch: Dispatch, weights: Weights) -> Tensor:
    """y_t = sum over t's pairs of weight * post(down_e(activate(gate_up_e x_t))), in plain autograd."""
    dtype = compute_dtype(x_TD, weights)
    out_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(dtype, torch.float32))
    bounds = dispatch.offsets_E1.tolist()
    for e, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            continue
        token_s = dispatch.token_S[start:end]
        h_sH = linear(x_TD[token_s].to(dtype), weights.gate_up_EHD[e].to(dtype))
        if weights.form.gate_up_bias_EH is not None:
            h_sH = h_sH + weights.form.gate_up_bias_EH[e].to(dtype)
        y_sD = linear(weights.form.activate(h_sH), weights.down_EDI[e].to(dtype))
        if weights.form.down_bias_ED is not None:
            y_sD = y_sD + weights.form.down_bias_ED[e].to(dtype)
        if weights.form.post is not None:
            y_sD = weights.form.post(y_sD)
        weighted_sD = y_sD.to(out_TD.dtype) * dispatch.weight_S[start:end, None].to(out_TD.dtype)
        out_TD = out_TD.index_add(0, token_s, weighted_sD)
    return out_TD.to(x_TD.dtype)
