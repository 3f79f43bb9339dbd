"""SwiGLU experts over a few pairs, straight from stacked bf16 weights; see kernels/few_rows.py for when and why.

Shape legend: T tokens, S pairs sorted by expert, P hit experts, E experts, D model width, I inner width, H = 2I.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

CHUNK = 16
"""Weight rows that one core takes at a time; divides D and I."""


@intrinsic
def _widen(context, bits):
    """bf16 bits to fp32: they are its upper half."""

    def code(context, builder, signature, arguments):
        high = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(high, ir.FloatType())

    return types.float32(types.uint16), code


@numba.njit(fastmath=True, inline="always")
def _dot(weight_A, row_A):
    total = np.float32(0)
    for a in range(row_A.shape[0]):
        total += _widen(weight_A[a]) * row_A[a]
    return total


@numba.njit(fastmath=True, inline="always")
def _two_rows(weight_A, one_A, two_A):
    """Two pairs of one expert share the loads and conversions of its weights."""
    first, second = np.float32(0), np.float32(0)
    for a in range(one_A.shape[0]):
        w = _widen(weight_A[a])
        first += w * one_A[a]
        second += w * two_A[a]
    return first, second


@numba.njit(fastmath=True, inline="always")
def _silu(gate):
    return gate / (np.float32(1) + np.exp(-gate))


@numba.njit(parallel=True, fastmath=True, cache=True)
def swiglu(x_TD, spans_P3, token_S, weight_S, gate_up_EHD, down_EDI, y_TD):
    """Add to y the weighted outputs of every pair. `spans_P3` rows are (expert, first pair, end pair)."""
    hit, width, inner = spans_P3.shape[0], down_EDI.shape[1], down_EDI.shape[2]
    a_SI = np.empty((token_S.shape[0], inner), np.float32)
    columns = inner // CHUNK
    for job in numba.prange(hit * columns):
        expert, start, end = spans_P3[job // columns]
        for i in range(job % columns * CHUNK, job % columns * CHUNK + CHUNK):
            gate_D, up_D = gate_up_EHD[expert, i], gate_up_EHD[expert, inner + i]
            for s in range(start, end - 1, 2):
                one_D, two_D = x_TD[token_S[s]], x_TD[token_S[s + 1]]
                gates, ups = _two_rows(gate_D, one_D, two_D), _two_rows(up_D, one_D, two_D)
                a_SI[s, i] = _silu(gates[0]) * ups[0] * weight_S[s]
                a_SI[s + 1, i] = _silu(gates[1]) * ups[1] * weight_S[s + 1]
            if (end - start) % 2:
                row_D = x_TD[token_S[end - 1]]
                a_SI[end - 1, i] = _silu(_dot(gate_D, row_D)) * _dot(up_D, row_D) * weight_S[end - 1]
    for job in numba.prange(width // CHUNK):  # a column's sum over pairs stays on one core, in one order
        for p in range(hit):
            expert, start, end = spans_P3[p]
            for d in range(job * CHUNK, job * CHUNK + CHUNK):
                down_I = down_EDI[expert, d]
                for s in range(start, end - 1, 2):
                    first, second = _two_rows(down_I, a_SI[s], a_SI[s + 1])
                    y_TD[token_S[s], d] += first
                    y_TD[token_S[s + 1], d] += second
                if (end - start) % 2:
                    y_TD[token_S[end - 1], d] += _dot(down_I, a_SI[end - 1])
