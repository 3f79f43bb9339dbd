"""The torch path: plain matmuls over sorted pairs with a hand-written backward. Any device, any floating dtype.

Plain SwiGLU runs as one autograd function that keeps only x and the first product's rows h [S, H]: the gathered x,
the activations and the weighted gradient are cheaper to recompute than to keep. Anything else (other activations,
custom gates, a norm after the expert) is composed of the same products with PyTorch's own gradients in between,
so parameters inside those callables get theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.core.registry import register
from moesaic.core.routing import Dispatch
from moesaic.kernels import products
from moesaic.kernels.combine import TokenOrder, sum_per_token
from moesaic.kernels.weights import Weights, compute_dtype


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD, weight_S, gate_up_EHD, down_EDI, gate_up_bias, down_bias, token_S, bounds, dtype):
        x_SD = x_TD.to(dtype).index_select(0, token_S)
        h_SH = products.rows_by_weight(x_SD, gate_up_EHD, gate_up_bias, bounds)
        gate_SI, up_SI = h_SH.chunk(2, dim=1)
        y_SD = products.rows_by_weight(torch.nn.functional.silu(gate_SI).mul_(up_SI), down_EDI, down_bias, bounds)
        order = TokenOrder.of(token_S, x_TD.shape[0])
        ctx.save_for_backward(x_TD, weight_S, gate_up_EHD, down_EDI, gate_up_bias, down_bias, token_S, h_SH, *order)
        ctx.bounds, ctx.dtype = bounds, dtype
        return sum_per_token(y_SD, weight_S, order, x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor):
        x_TD, weight_S, gate_up_EHD, down_EDI, gate_up_bias, down_bias, token_S, h_SH, *order = ctx.saved_tensors
        bounds, dtype = ctx.bounds, ctx.dtype
        need_x, need_w, need_gate_up, need_down, need_gate_up_bias, need_down_bias = ctx.needs_input_grad[:6]
        wide = torch.promote_types(dtype, torch.float32)
        weight_S1 = weight_S.unsqueeze(1).to(wide)
        grad_SD = grad_TD.to(dtype).index_select(0, token_S)
        gate_SI, up_SI = h_SH.to(wide).chunk(2, dim=1)
        sigmoid_SI = torch.sigmoid(gate_SI)
        silu_SI = gate_SI * sigmoid_SI
        a_SI = silu_SI * up_SI
        da_SI = products.grad_of_rows(grad_SD, down_EDI, bounds).to(wide)  # before the pair's weight
        d_weight = d_down = d_gate_up = d_gate_up_bias = d_down_bias = d_x = None
        if need_w:
            d_weight = (da_SI * a_SI).sum(1)
            if down_bias is not None:
                d_weight = d_weight + products.rows_by_weight(grad_SD, down_bias.unsqueeze(1), None, bounds).squeeze(1)
            d_weight = d_weight.to(weight_S.dtype)
        if need_down:
            d_down = products.grad_of_weight(grad_SD, (a_SI * weight_S1).to(dtype), down_EDI, bounds)
        if need_down_bias:
            d_down_bias = products.grad_of_bias(grad_SD * weight_S1, down_bias, bounds)
        if need_x or need_gate_up or need_gate_up_bias:
            da_SI = da_SI * weight_S1
            dh_SH = torch.empty_like(h_SH)
            d_gate_SI, d_up_SI = dh_SH.chunk(2, dim=1)
            d_gate_SI.copy_(da_SI * up_SI * (sigmoid_SI + silu_SI * (1 - sigmoid_SI)))
            d_up_SI.copy_(da_SI * silu_SI)
            if need_x:
                d_x = sum_per_token(products.grad_of_rows(dh_SH, gate_up_EHD, bounds), None, TokenOrder(*order), x_TD.dtype)
            if need_gate_up:
                x_SD = x_TD.to(dtype).index_select(0, token_S)
                d_gate_up = products.grad_of_weight(dh_SH, x_SD, gate_up_EHD, bounds)
            if need_gate_up_bias:
                d_gate_up_bias = products.grad_of_bias(dh_SH, gate_up_bias, bounds)
        return d_x, d_weight, d_gate_up, d_down, d_gate_up_bias, d_down_bias, None, None, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_SA, weight_EBA, bias_EB, bounds):
        ctx.save_for_backward(rows_SA, weight_EBA, bias_EB)
        ctx.bounds = bounds
        return products.rows_by_weight(rows_SA, weight_EBA, bias_EB, bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SB: Tensor):
        rows_SA, weight_EBA, bias_EB = ctx.saved_tensors
        need_rows, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_SB = grad_SB.contiguous()
        return (
            products.grad_of_rows(grad_SB, weight_EBA, ctx.bounds) if need_rows else None,
            products.grad_of_weight(grad_SB, rows_SA, weight_EBA, ctx.bounds) if need_weight else None,
            products.grad_of_bias(grad_SB, bias_EB, ctx.bounds) if need_bias else None,
            None,
        )


class _Gather(torch.autograd.Function):
    """x[token_S]; its gradient sums a token's pairs in fp32 and in a fixed order, unlike index_put's."""

    @staticmethod
    def forward(ctx: Any, x_TD, token_S, pair_S, start_T):
        ctx.save_for_backward(pair_S, start_T)
        return x_TD.index_select(0, token_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor):
        return sum_per_token(grad_SD.contiguous(), None, TokenOrder(*ctx.saved_tensors), grad_SD.dtype), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_SD, weight_S, token_S, pair_S, start_T, dtype):
        ctx.save_for_backward(y_SD, weight_S, token_S)
        return sum_per_token(y_SD, weight_S, TokenOrder(pair_S, start_T), dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor):
        y_SD, weight_S, token_S = ctx.saved_tensors
        wide = torch.promote_types(y_SD.dtype, torch.float32)
        grad_SD = grad_TD.to(wide).index_select(0, token_S)
        d_weight = (grad_SD * y_SD.to(wide)).sum(1).to(weight_S.dtype)
        return (grad_SD * weight_S.unsqueeze(1).to(wide)).to(y_SD.dtype), d_weight, None, None, None, None


@register("kernels", "torch", card="benchmarks.md#moe-layer", devices="any", training=True)
def torch_path(x_TD: Tensor, dispatch: Dispatch, weights: Weights) -> Tensor:
    """Sorted rows, one matmul per hit expert, hand-written backward; any device and dtype."""
    dtype = compute_dtype(x_TD, weights)
    bounds = dispatch.offsets_E1.tolist()
    with torch.autocast(x_TD.device.type, enabled=False):
        if weights.swiglu:
            return _SwiGLU.apply(
                x_TD,
                dispatch.weight_S,
                weights.gate_up_EHD,
                weights.down_EDI,
                weights.gate_up_bias_EH,
                weights.down_bias_ED,
                dispatch.token_S,
                bounds,
                dtype,
            )
        order = TokenOrder.of(dispatch.token_S, dispatch.tokens)
        x_SD = _Gather.apply(x_TD.to(dtype), dispatch.token_S, *order)
        a_SI = weights.activate(_Product.apply(x_SD, weights.gate_up_EHD, weights.gate_up_bias_EH, bounds))
        y_SD = _Product.apply(a_SI.contiguous(), weights.down_EDI, weights.down_bias_ED, bounds)
        if weights.post is not None:
            y_SD = weights.post(y_SD)
        return _Combine.apply(y_SD, dispatch.weight_S, dispatch.token_S, *order, x_TD.dtype)
