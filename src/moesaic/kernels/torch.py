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
from torch.nn.functional import silu

from moesaic.core.registry import register
from moesaic.core.routing import Dispatch
from moesaic.kernels import many_back, many_rows, products
from moesaic.kernels.combine import TokenOrder, sum_per_token
from moesaic.kernels.products import blocks, hit_spans
from moesaic.kernels.slots import bounds_of
from moesaic.kernels.weights import Weights, compute_dtype


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD, weight_S, gate_up_EHD, down_EDI, gate_up_bias, down_bias, token_S, spans, dtype, compiled):
        order = TokenOrder.of(token_S, x_TD.shape[0])
        x_cast_TD = x_TD.to(dtype)
        pairs = token_S.numel()
        h_SH = x_cast_TD.new_empty(pairs, gate_up_EHD.shape[1])
        ctx.spans, ctx.dtype, ctx.compiled = spans, dtype, compiled
        ctx.save_for_backward(x_TD, weight_S, gate_up_EHD, down_EDI, gate_up_bias, down_bias, token_S, h_SH, *order)
        if compiled:
            return many_rows.forward(x_TD, token_S, weight_S, gate_up_EHD, down_EDI, spans, h_SH)
        y_SD = x_cast_TD.new_empty(pairs, x_TD.shape[1])
        for block in blocks(spans, x_TD.device):
            here = slice(block[0][1], block[-1][2])
            x_sD = x_cast_TD.index_select(0, token_S[here])
            gate_sI, up_sI = products.rows_by_weight(x_sD, gate_up_EHD, gate_up_bias, block, h_SH[here]).chunk(2, dim=1)
            products.rows_by_weight(silu(gate_sI).mul_(up_sI), down_EDI, down_bias, block, y_SD[here])
        return sum_per_token(y_SD, weight_S, order, x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor):
        x_TD, weight_S, gate_up_EHD, down_EDI, gate_up_bias, down_bias, token_S, h_SH, *order = ctx.saved_tensors
        need_x, need_w, need_gate_up, need_down, need_gate_up_bias, need_down_bias = ctx.needs_input_grad[:6]
        spans, dtype, pairs = ctx.spans, ctx.dtype, token_S.numel()
        wide = torch.promote_types(dtype, torch.float32)
        if ctx.compiled and need_x and need_w and need_gate_up and need_down and many_back.fits(spans):
            grads = many_back.backward(grad_TD, x_TD, token_S, weight_S, gate_up_EHD, down_EDI, h_SH, spans)
            return *grads, None, None, None, None, None, None
        x_TD_cast, grad_TD_cast = x_TD.to(dtype), grad_TD.to(dtype)
        dx_SD = x_TD_cast.new_empty(pairs, x_TD.shape[1]) if need_x else None
        d_weight = torch.empty_like(weight_S) if need_w else None
        d_gate_up = products.empty_grad(gate_up_EHD, spans) if need_gate_up else None
        d_down = products.empty_grad(down_EDI, spans) if need_down else None
        d_gate_up_bias = torch.zeros_like(gate_up_bias) if need_gate_up_bias else None
        d_down_bias = torch.zeros_like(down_bias) if need_down_bias else None
        for block in blocks(spans, x_TD.device):
            here = slice(block[0][1], block[-1][2])
            weight_s1 = weight_S[here].unsqueeze(1).to(wide)
            grad_sD = grad_TD_cast.index_select(0, token_S[here])
            gate_sI, up_sI = h_SH[here].to(wide).chunk(2, dim=1)
            silu_sI = silu(gate_sI)
            a_sI = silu_sI * up_sI
            da_sI = products.grad_of_rows(grad_sD, down_EDI, block).to(wide)  # before the pair's weight
            if d_weight is not None:
                d_weight_s = (da_sI * a_sI).sum(1)
                if down_bias is not None:
                    d_weight_s += products.rows_by_weight(grad_sD, down_bias.unsqueeze(1), None, block).squeeze(1)
                d_weight[here] = d_weight_s
            if d_down is not None:
                products.put_grad_of_weight(
                    d_down, grad_sD, torch.mul(a_sI, weight_s1, out=a_sI.new_empty(a_sI.shape, dtype=dtype)), block
                )
            if d_down_bias is not None:
                products.put_grad_of_bias(d_down_bias, grad_sD * weight_s1, block)
            if not (need_x or need_gate_up or need_gate_up_bias):
                continue
            da_sI *= weight_s1
            dh_sH = h_SH.new_empty(da_sI.shape[0], h_SH.shape[1])
            d_gate_sI, d_up_sI = dh_sH.chunk(2, dim=1)
            torch.mul(da_sI, silu_sI, out=d_up_sI)
            d_gate_sI.copy_(torch.ops.aten.silu_backward(da_sI.mul_(up_sI), gate_sI))
            if dx_SD is not None:
                products.grad_of_rows(dh_sH, gate_up_EHD, block, dx_SD[here])
            if d_gate_up is not None:
                products.put_grad_of_weight(d_gate_up, dh_sH, x_TD_cast.index_select(0, token_S[here]), block)
            if d_gate_up_bias is not None:
                products.put_grad_of_bias(d_gate_up_bias, dh_sH, block)
        d_x = None if dx_SD is None else sum_per_token(dx_SD, None, TokenOrder(*order), x_TD.dtype)
        return d_x, d_weight, d_gate_up, d_down, d_gate_up_bias, d_down_bias, None, None, None, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_SA, weight_EBA, bias_EB, spans):
        ctx.save_for_backward(rows_SA, weight_EBA, bias_EB)
        ctx.spans = spans
        return products.rows_by_weight(rows_SA, weight_EBA, bias_EB, spans)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SB: Tensor):
        rows_SA, weight_EBA, bias_EB = ctx.saved_tensors
        need_rows, need_weight, need_bias = ctx.needs_input_grad[:3]
        spans, grad_SB = ctx.spans, grad_SB.contiguous()
        d_weight = d_bias = None
        if need_weight:
            d_weight = products.empty_grad(weight_EBA, spans)
            products.put_grad_of_weight(d_weight, grad_SB, rows_SA, spans)
        if need_bias:
            d_bias = torch.zeros_like(bias_EB)
            products.put_grad_of_bias(d_bias, grad_SB, spans)
        return products.grad_of_rows(grad_SB, weight_EBA, spans) if need_rows else None, d_weight, d_bias, None


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
    spans = hit_spans(bounds_of(dispatch))
    with torch.autocast(x_TD.device.type, enabled=False):
        if weights.form.swiglu:
            return _SwiGLU.apply(
                x_TD,
                dispatch.weight_S,
                weights.gate_up_EHD,
                weights.down_EDI,
                weights.form.gate_up_bias_EH,
                weights.form.down_bias_ED,
                dispatch.token_S,
                spans,
                dtype,
                x_TD.device.type == "cpu" and bool(spans) and many_rows.fits(weights, dtype, spans),
            )
        order = TokenOrder.of(dispatch.token_S, dispatch.tokens)
        x_SD = _Gather.apply(x_TD.to(dtype), dispatch.token_S, *order)
        a_SI = weights.form.activate(_Product.apply(x_SD, weights.gate_up_EHD, weights.form.gate_up_bias_EH, spans))
        y_SD = _Product.apply(a_SI.contiguous(), weights.down_EDI, weights.form.down_bias_ED, spans)
        if weights.form.post is not None:
            y_SD = weights.form.post(y_SD)
        return _Combine.apply(y_SD, dispatch.weight_S, dispatch.token_S, *order, x_TD.dtype)
