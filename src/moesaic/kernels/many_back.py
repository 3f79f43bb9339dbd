"""The backward pass of many_rows.py: every gradient of a SwiGLU bank over the stored bf16 weights, on the same machines.

Where the contraction runs along the weights' other axis, pairs of their rows are put side by side as they are used, a few
columns at a time, which stay in the cache (compiled/broadcast_tile.py); weight gradients are written once, past the cache.
Its twin is kernels/reference.py, and the formulas are in the README.

Shape legend: T tokens, S pairs, D model width, I inner width, H = 2I.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.kernels.few_rows import bits
from moesaic.kernels.many_rows import rounds
from moesaic.kernels.memory import scratch
from moesaic.kernels.products import Span, empty_grad

MOST_ROWS = 4096
"""Pairs of one expert that are taken at once; with more, rows would fall out of every cache."""

ROUND_BYTES = 12 << 20
"""Packed operands held at a time: about what a third-level cache keeps while the next products read them."""


class Grads(NamedTuple):
    """Of the tokens, the pairs' weights and the stacked weights."""

    x_TD: Tensor
    weight_S: Tensor
    gate_up_EHD: Tensor
    down_EDI: Tensor


def fits(spans: list[Span]) -> bool:
    """Whether this pass takes spans whose forward many_rows.py computed."""
    return max(end - start for _, start, end in spans) <= MOST_ROWS


def backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    token_S: Tensor,
    weight_S: Tensor,
    gate_up: Tensor,
    down: Tensor,
    h_SH: Tensor,
    spans: list[Span],
) -> Grads:
    """Gradients in the dtypes of what they are gradients of; those of experts without pairs are zeros."""
    from moesaic.kernels.compiled import back, pool

    cores = pool.join()
    width, inner = down.shape[1:]
    height = 2 * inner
    dx_TD = scratch("back_x", x_TD.shape[0], width, torch.float32).zero_()
    d_weight_CS = torch.zeros(cores, token_S.numel())
    d_gate_up, d_down = empty_grad(gate_up, spans), empty_grad(down, spans)
    x_TD_bits, dy_TD_bits = (bits(t.to(torch.bfloat16).contiguous()) for t in (x_TD, grad_TD))
    weight_S_wide = weight_S.detach().float().numpy()
    paired = max(back.blocks_at_once(rows) * rows for rows in (width, height)) * back.COLUMNS // 2
    for pieces in rounds(spans, MOST_ROWS, ROUND_BYTES // (48 * width + 32 * height + 16 * inner)):
        rows = 8 * (pieces[-1][3] + -(-(pieces[-1][2] - pieces[-1][1]) // 8))
        dy = _words("back_dy", rows * width)
        back.swiglu_back(
            torch.tensor(pieces).numpy(),
            token_S.numpy(),
            weight_S_wide,
            x_TD_bits,
            dy_TD_bits.view("uint64"),
            bits(h_SH),
            bits(gate_up),
            bits(down),
            dy.view("uint64").reshape(rows // 8, -1),
            dy,
            _words("back_dy_turned", rows * width),
            _words("back_x_pairs", rows * width).view("uint32"),
            _words("back_dh", rows * height),
            _words("back_dh_turned", rows * height),
            _words("back_a_pairs", rows * inner).view("uint32"),
            _words("back_weights", cores * 2 * paired).view("uint32").reshape(cores, -1),
            scratch("back_sums", cores, 256, torch.float32).numpy(),
            _words("back_small", cores * 3 * 256).reshape(cores, 3, 256),
            dx_TD.numpy(),
            d_weight_CS.numpy(),
            bits(d_gate_up),
            bits(d_down),
        )
    return Grads(dx_TD.to(x_TD.dtype, copy=True), d_weight_CS.sum(0).to(weight_S.dtype), d_gate_up, d_down)


def _words(name: str, count: int) -> Any:
    """Scratch of 16-bit words."""
    return bits(scratch(name, 1, count, torch.bfloat16)[0])
