"""Many rows per expert on a CPU whose only matrix instruction is AVX-512's `vdpbf16ps`: a SwiGLU bank over the stored
bf16 weights.

The libraries re-block every weight matrix before they multiply it. This pass, compiled by Numba (an extra), gathers the
rows into blocks of its own instead, which are small, and reads weights as they lie, once, fetching the next ones while it
multiplies (compiled/tile.py). Its twin is kernels/reference.py.

Shape legend: T tokens, S pairs, P pieces of experts' spans, D model width, I inner width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moesaic.core.routing import Dispatch
from moesaic.kernels import few_rows
from moesaic.kernels.memory import scratch
from moesaic.kernels.products import Span
from moesaic.kernels.weights import Weights

FEWEST_ROWS = 1.5
"""Pairs per hit expert from which this pass is the faster one; up to there few_rows.py is, by some percent, and closer."""

MULTIPLE = 32
"""Of which D and I must be multiples: compiled/tile.py's LINE."""

PIECE_BYTES = 1 << 19
"""Rows of one expert taken at a time: half of a core's second-level cache, which they have to stay in."""

SCRATCH_BYTES = 32 << 20
"""Packed rows held at a time; more pairs are done in several rounds."""


def available() -> bool:
    """Whether this machine has the instruction, and no matrix unit (AMX) that the libraries would use instead."""
    return few_rows.host_has("avx512bf16") and not few_rows.host_has("amx-bf16")


def fits(weights: Weights, dtype: torch.dtype, spans: list[Span]) -> bool:
    """Whether this pass computes these weights as asked, and is the fast way for so many rows."""
    return spans[-1][2] > FEWEST_ROWS * len(spans) and suits(weights, dtype)


def suits(weights: Weights, dtype: torch.dtype) -> bool:
    """Whether this pass can run these weights, on this machine."""
    return (
        few_rows.suits(weights, dtype) and weights.inner_width % MULTIPLE == weights.model_width % MULTIPLE == 0 and available()
    )


def run(x_TD: Tensor, dispatch: Dispatch, weights: Weights, spans: list[Span]) -> Tensor:
    """y [T, D] in x's dtype; no gradients. `spans` are the hit experts, as products.hit_spans gives them.

    The first call on a machine compiles for some seconds; a file cache serves the next process.
    """
    return forward(x_TD, dispatch.token_S, dispatch.weight_S, weights.gate_up, weights.down, spans)


def add(x_TD: Tensor, dispatch: Dispatch, weights: Weights, spans: list[Span], y_TD: Tensor) -> None:
    """Add these spans' weighted outputs to y (fp32). Spans one after another, in however many calls, give the same bits."""
    _add(x_TD, dispatch.token_S, dispatch.weight_S, weights.gate_up, weights.down, spans, None, y_TD)


def forward(
    x_TD: Tensor,
    token_S: Tensor,
    weight_S: Tensor,
    gate_up: Tensor,
    down: Tensor,
    spans: list[Span],
    h_SH: Tensor | None = None,
) -> Tensor:
    """`run`, which also leaves the first product in `h_SH` (bf16) where a backward pass will want it."""
    y_TD = scratch("many_y", x_TD.shape[0], down.shape[1], torch.float32).zero_()
    _add(x_TD, token_S, weight_S, gate_up, down, spans, h_SH, y_TD)
    return y_TD.to(x_TD.dtype, copy=True)


def _add(
    x_TD: Tensor,
    token_S: Tensor,
    weight_S: Tensor,
    gate_up: Tensor,
    down: Tensor,
    spans: list[Span],
    h_SH: Tensor | None,
    y_TD: Tensor,
) -> None:
    from moesaic.kernels.compiled import many, pool

    cores = pool.join()
    width, inner = down.shape[1:]
    if h_SH is None:
        h_SH = gate_up.new_empty(0, 2 * inner)
    x_TD_bits = few_rows.bits(x_TD.to(torch.bfloat16).contiguous())
    most = max(24, PIECE_BYTES // (2 * max(width, inner)) // 24 * 24)
    for pieces in rounds(spans, most, SCRATCH_BYTES // (16 * (width + inner))):
        groups = pieces[-1][3] + _groups(pieces[-1])
        x_GD = few_rows.bits(scratch("many_x", groups, 8 * width, torch.bfloat16))
        many.swiglu(
            x_TD_bits.view("uint64"),
            torch.tensor(pieces).numpy(),
            token_S.numpy(),
            weight_S.detach().float().numpy(),
            few_rows.bits(gate_up),
            few_rows.bits(down),
            x_GD.view("uint64"),
            x_GD,
            few_rows.bits(scratch("many_a", groups, 8 * inner, torch.bfloat16)),
            scratch("many_sums", cores * many.BAND, most // 8 * 64, torch.float32).view(cores, many.BAND, -1, 64).numpy(),
            few_rows.bits(h_SH),
            y_TD.numpy(),
        )


Piece = tuple[int, int, int, int]
"""Expert, first pair, end pair, first group of packed rows."""


def _groups(piece: tuple[int, ...]) -> int:
    return -(-(piece[2] - piece[1]) // 8)


def rounds(spans: list[Span], most: int, room: int) -> Iterator[list[Piece]]:
    """Spans cut into pieces of at most `most` pairs, as many at a time as `room` groups of packed rows hold."""
    pieces: list[Piece] = []
    at = 0
    for expert, start, end in spans:
        for first in range(start, end, most):
            piece = expert, first, min(first + most, end), at
            if pieces and at + _groups(piece) > room:
                yield pieces
                pieces, at = [], 0
                piece = *piece[:3], 0
            pieces.append(piece)
            at += _groups(piece)
    yield pieces
