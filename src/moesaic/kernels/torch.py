"""The torch path: one expert at a time in plain matmuls, with a hand-written backward that keeps only the inner rows.

Runs on any device and dtype. Against autograd over the naive twin it saves the zero-filled [E, H, D] gradient that
every expert slice would otherwise allocate, and casts each hit expert once under autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from moesaic.core.routing import Dispatch


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_S, gate_up_EHD, down_EDI, token_S, bounds, dtype):
        x_TD = x_TD.to(dtype)
        h_SH = x_TD.new_empty(token_S.numel(), gate_up_EHD.shape[1])
        y_SD = x_TD.new_empty(token_S.numel(), x_TD.shape[1])
        x_SD = x_TD[token_S]
        width = down_EDI.shape[2]
        for e, (s, t) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if s < t:
                torch.mm(x_SD[s:t], gate_up_EHD[e].to(dtype).T, out=h_SH[s:t])
        a_SI = silu(h_SH[:, :width]).mul_(h_SH[:, width:])
        for e, (s, t) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if s < t:
                torch.mm(a_SI[s:t], down_EDI[e].to(dtype).T, out=y_SD[s:t])
        ctx.save_for_backward(x_TD, weight_S, gate_up_EHD, down_EDI, token_S, h_SH)
        ctx.bounds = bounds
        out_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        out_TD.index_add_(0, token_S, (y_SD * weight_S.unsqueeze(1)).float())
        return out_TD.to(dtype)

    @staticmethod
    def backward(ctx, grad_TD):
        x_TD, weight_S, gate_up_EHD, down_EDI, token_S, h_SH = ctx.saved_tensors
        bounds, dtype, width = ctx.bounds, x_TD.dtype, down_EDI.shape[2]
        grad_SD, x_SD = grad_TD.to(dtype)[token_S], x_TD[token_S]
        gate_SI, up_SI = h_SH[:, :width].float(), h_SH[:, width:].float()
        sig_SI = torch.sigmoid(gate_SI)
        silu_SI = gate_SI * sig_SI
        a_SI = (silu_SI * up_SI).to(dtype)
        aw_SI = a_SI * weight_S.unsqueeze(1).to(dtype)
        da_SI = torch.empty_like(a_SI)
        d_down = torch.zeros_like(down_EDI)
        for e, (s, t) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if s < t:
                torch.mm(grad_SD[s:t], down_EDI[e].to(dtype), out=da_SI[s:t])
                d_down[e] = grad_SD[s:t].T @ aw_SI[s:t]
        d_weight = (da_SI.float() * a_SI).sum(1).to(weight_S.dtype)
        daw_SI = da_SI.float() * weight_S.unsqueeze(1)
        d_gate = daw_SI * up_SI * (sig_SI * (1 + gate_SI * (1 - sig_SI)))
        dh_SH = torch.cat([d_gate, daw_SI * silu_SI], 1).to(dtype)
        dx_SD = torch.empty_like(x_SD)
        d_gate_up = torch.zeros_like(gate_up_EHD)
        for e, (s, t) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if s < t:
                torch.mm(dh_SH[s:t], gate_up_EHD[e].to(dtype), out=dx_SD[s:t])
                d_gate_up[e] = dh_SH[s:t].T @ x_SD[s:t]
        dx_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        dx_TD.index_add_(0, token_S, dx_SD.float())
        return dx_TD.to(grad_TD.dtype), d_weight, d_gate_up, d_down, None, None, None


def expert_mlp(x_TD: Tensor, dispatch: Dispatch, gate_up_EHD: Tensor, down_EDI: Tensor) -> Tensor:
    """SwiGLU experts over a dispatch; y [T, D] in the compute dtype (autocast's where it is on, else the weights')."""
    device = x_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else gate_up_EHD.dtype
    bounds = dispatch.offsets_E1.tolist()
    return _SwiGLU.apply(x_TD, dispatch.weight_S, gate_up_EHD, down_EDI, dispatch.token_S, bounds, dtype)
