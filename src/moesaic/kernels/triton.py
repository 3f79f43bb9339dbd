"""The GPU path: grouped SwiGLU in Triton, rows gathered inside the kernels, SwiGLU in the epilogue, deterministic.

Against an unfused layer it never writes the gathered x, the gathered gradient or the gate/up rows of an inference pass.
Training keeps x, the routing and h [S, 2I]; activations are computed again in backward. A pair's output is written
where its token will read it, so the combine is a sum of neighbouring rows, without atomics and without a permutation.

Everything but plain SwiGLU (biases, other activations, custom gates) takes the torch path; `missing` says why.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Dispatch
from moesaic.kernels.gpu.tiles import Tiles, block_rows
from moesaic.kernels.weights import Weights, compute_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def missing(weights: Weights, dtype: torch.dtype) -> str | None:
    """Why this path cannot run these weights; None when it can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if dtype not in DTYPES:
        return f"no {dtype} products"
    if not weights.form.swiglu:
        return "the experts are not plain SwiGLU"
    if weights.form.gate_up_bias_EH is not None or weights.form.down_bias_ED is not None:
        return "the experts have biases"
    return None


@register("kernels", "triton", card="benchmarks.md#moe-layer", devices="cuda", training=True, gpu="not yet run on a GPU")
def triton(x_TD: Tensor, dispatch: Dispatch, weights: Weights) -> Tensor:
    """Fused grouped SwiGLU on a GPU: gathered rows, no atomics, activations recomputed in backward."""
    dtype = compute_dtype(x_TD, weights)
    reason = missing(weights, dtype)
    if reason:
        raise BadInput(f"the triton kernel cannot run this: {reason}; use backend='auto' or 'torch'")
    pair_S = torch.argsort(dispatch.token_S, stable=True)
    place_S = torch.empty_like(pair_S).scatter_(0, pair_S, torch.arange(pair_S.numel(), device=pair_S.device))
    starts_T1 = torch.nn.functional.pad(torch.bincount(dispatch.token_S, minlength=dispatch.tokens).cumsum(0), (1, 0))
    gate_up_EHD, down_EDI = weights.gate_up_EHD.to(dtype), weights.down_EDI.to(dtype)
    plan = (dispatch.token_S, dispatch.offsets_E1, place_S, starts_T1)
    with torch.autocast(x_TD.device.type, enabled=False):
        return _Layer.apply(x_TD.to(dtype).contiguous(), dispatch.weight_S, gate_up_EHD, down_EDI, *plan).to(x_TD.dtype)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD, weight_S, gate_up_EHD, down_EDI, token_S, offsets_E1, place_S, starts_T1):
        pairs, inner = token_S.numel(), down_EDI.shape[2]
        tiles = Tiles.of(offsets_E1, pairs, block_rows(pairs, offsets_E1.numel() - 1))
        training = any(ctx.needs_input_grad)
        a_SI = x_TD.new_empty(pairs, inner)
        h_SH = x_TD.new_empty(pairs, 2 * inner) if training else a_SI
        _hidden(x_TD, token_S, offsets_E1, tiles, gate_up_EHD, h_SH, a_SI, training)
        y_SD = x_TD.new_empty(pairs, x_TD.shape[1])
        _product(a_SI, None, offsets_E1, tiles, down_EDI, weight_S, place_S, y_SD)
        if training:
            ctx.save_for_backward(x_TD, weight_S, gate_up_EHD, down_EDI, token_S, offsets_E1, place_S, starts_T1, h_SH)
            ctx.tiles = tiles
        return _token_sum(y_SD, starts_T1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor):
        x_TD, weight_S, gate_up_EHD, down_EDI, token_S, offsets_E1, place_S, starts_T1, h_SH = ctx.saved_tensors
        need_x, need_w, need_gate_up, need_down = ctx.needs_input_grad[:4]
        grad_TD = grad_TD.contiguous()
        aw_SI = h_SH.new_empty(h_SH.shape[0], h_SH.shape[1] // 2)
        dh_SH = torch.empty_like(h_SH)
        d_weight = _hidden_grad(grad_TD, token_S, offsets_E1, ctx.tiles, down_EDI, h_SH, weight_S, dh_SH, aw_SI)
        d_x = d_gate_up = d_down = None
        if need_down:
            d_down = _weight_grad(grad_TD, token_S, aw_SI, None, offsets_E1, torch.empty_like(down_EDI))
        if need_gate_up:
            d_gate_up = _weight_grad(dh_SH, None, x_TD, token_S, offsets_E1, torch.empty_like(gate_up_EHD))
        if need_x:
            dx_SD = x_TD.new_empty(token_S.numel(), x_TD.shape[1])
            _product(dh_SH, None, offsets_E1, ctx.tiles, gate_up_EHD.transpose(1, 2), None, place_S, dx_SD)
            d_x = _token_sum(dx_SD, starts_T1)
        return d_x, d_weight.to(weight_S.dtype) if need_w else None, d_gate_up, d_down, None, None, None, None


def _shape(rows: int, dtype: torch.dtype, accumulators: int) -> dict[str, Any]:
    """Block sizes and warps for a tile of `rows`: wide tiles need eight warps to hold their accumulators."""
    wide = 64 if dtype == torch.float32 or (accumulators == 2 and rows >= 128) else 128
    depth = 32 if dtype == torch.float32 else 64
    return {"N": wide, "K": depth, "num_warps": 8 if rows >= 128 else 4, "num_stages": 3}


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _hidden(x_TD, token_S, offsets_E1, tiles: Tiles, gate_up_EHD, h_SH, a_SI, store_h: bool) -> None:
    from moesaic.kernels.gpu import programs

    width, inner, experts = x_TD.shape[1], a_SI.shape[1], gate_up_EHD.shape[0]
    shape = _shape(tiles.block_m, x_TD.dtype, 2)
    grid = (tiles.expert_N.numel() * -(-inner // shape["N"]),)
    if 0 in grid:
        return
    programs.hidden[grid](
        x_TD, token_S, offsets_E1, tiles.expert_N, tiles.row_N, gate_up_EHD, h_SH, a_SI,
        width, inner, experts, x_TD.stride(0), *gate_up_EHD.stride(),
        STORE_H=store_h, PRECISION=_precision(x_TD.dtype), M=tiles.block_m, **shape,
    )  # fmt: skip


def _product(rows_SA, source_S, offsets_E1, tiles: Tiles, weight_EBA, scale_S, place_S, out_SB) -> None:
    from moesaic.kernels.gpu import programs

    experts, wide, deep = weight_EBA.shape
    shape = _shape(tiles.block_m, rows_SA.dtype, 1)
    grid = (tiles.expert_N.numel() * -(-wide // shape["N"]),)
    if 0 in grid:
        return
    programs.product[grid](
        rows_SA, place_S if source_S is None else source_S, offsets_E1, tiles.expert_N, tiles.row_N, weight_EBA,
        place_S if scale_S is None else scale_S, place_S, out_SB,
        wide, deep, experts, rows_SA.stride(0), *weight_EBA.stride(),
        GATHER=source_S is not None, SCALE=scale_S is not None, PRECISION=_precision(rows_SA.dtype), M=tiles.block_m, **shape,
    )  # fmt: skip


def _hidden_grad(grad_TD, token_S, offsets_E1, tiles: Tiles, down_EDI, h_SH, weight_S, dh_SH, aw_SI) -> Tensor:
    from moesaic.kernels.gpu import programs

    experts, width, inner = down_EDI.shape
    shape = _shape(tiles.block_m, grad_TD.dtype, 2)
    columns = -(-inner // shape["N"])
    shares = torch.empty(token_S.numel(), columns, dtype=torch.float32, device=grad_TD.device)
    if token_S.numel() == 0:
        return shares.sum(1)
    programs.hidden_grad[(tiles.expert_N.numel() * columns,)](
        grad_TD, token_S, offsets_E1, tiles.expert_N, tiles.row_N, down_EDI, h_SH, weight_S, dh_SH, aw_SI, shares,
        width, inner, experts, columns, grad_TD.stride(0), *down_EDI.stride(),
        PRECISION=_precision(grad_TD.dtype), M=tiles.block_m, **shape,
    )  # fmt: skip
    return shares.sum(1)


def _weight_grad(left, left_source, right, right_source, offsets_E1, out_EBA: Tensor) -> Tensor:
    from moesaic.kernels.gpu import programs

    experts, wide, deep = out_EBA.shape
    shape = _shape(64, left.dtype, 1)
    grid = (-(-wide // 64), -(-deep // shape["N"]), experts)
    programs.weight_grad[grid](
        left, offsets_E1 if left_source is None else left_source, right, offsets_E1 if right_source is None else right_source,
        offsets_E1, out_EBA, wide, deep, left.stride(0), right.stride(0), *out_EBA.stride(),
        GATHER_LEFT=left_source is not None, GATHER_RIGHT=right_source is not None,
        PRECISION=_precision(left.dtype), M=64, **shape,
    )  # fmt: skip
    return out_EBA


def _token_sum(rows_SD: Tensor, starts_T1: Tensor) -> Tensor:
    from moesaic.kernels.gpu import programs

    out_TD = rows_SD.new_empty(starts_T1.numel() - 1, rows_SD.shape[1])
    grid = (out_TD.shape[0], -(-out_TD.shape[1] // 1024))
    if out_TD.numel():
        programs.token_sum[grid](rows_SD, starts_T1, out_TD, out_TD.shape[1], N=1024)
    return out_TD
