"""SwiGLU experts over a few pairs, straight from stacked bf16 weights; see kernels/few_rows.py for when and why.

Shape legend: T tokens, S pairs sorted by expert, P hit experts, E experts, D model width, I inner width, H = 2I. bf16
travels as uint16.
"""

from __future__ import annotations

import numba
import numpy as np

from moesaic.kernels.compiled.at import bf16_at, bf16_stack_at
from moesaic.kernels.compiled.choice import sorted_choice
from moesaic.kernels.compiled.many import exp_of_minus, rounded
from moesaic.kernels.compiled.row_dot import row_dot

CHUNK = 64
"""Inner columns that one core takes at a time: their gate rows one after another, then their up rows."""


@numba.njit(parallel=True, error_model="numpy", fastmath={"contract"}, cache=True)
def swiglu(x_TD, spans_P3, token_S, weight_S, gate_up_EHD, down_EDI, h_SH, a_SI, y_TD, parts):
    """Add to y the weighted outputs of every pair. `spans_P3` rows are (expert, first pair, end pair); h and a are room.
    `parts`: cores, each of which gets its share of the output columns."""
    hit, width, inner = spans_P3.shape[0], down_EDI.shape[1], down_EDI.shape[2]
    chunks = (inner + CHUNK - 1) // CHUNK
    for job in numba.prange(hit * chunks):
        expert, start, end = spans_P3[job // chunks]
        low = job % chunks * CHUNK
        high = min(low + CHUNK, inner)
        for half in (0, inner):
            for i in range(half + low, half + high):
                for s in range(start, end):
                    h_SH[s, i] = row_dot(gate_up_EHD[expert, i], x_TD[token_S[s]])
        for s in range(start, end):
            for i in range(low, high):
                gate = h_SH[s, i]
                a_SI[s, i] = rounded(h_SH[s, inner + i] * gate / (np.float32(1) + exp_of_minus(gate)))
    for part in numba.prange(parts):  # a column's sum over pairs stays on one core, in one order
        for p in range(hit):
            expert, start, end = spans_P3[p]
            for d in range(width * part // parts, width * (part + 1) // parts):
                for s in range(start, end):
                    y_TD[token_S[s], d] += weight_S[s] * row_dot(down_EDI[expert, d], a_SI[s])


@numba.njit(cache=True)
def one_token(x_at, ids_at, weights_at, gate_up_at, down_at, y_at, slots, experts, width, inner, parts):
    """`swiglu` for one token straight from a router's choice: ids [K] int64, weights [K] fp32, y [D] bf16, all by address.

    False, and nothing done, where an expert is chosen twice: its pairs would belong to the pass for many rows.
    """
    spans_P3, weight_S = np.empty((slots, 3), np.int64), np.empty(slots, np.float32)
    hit = sorted_choice(ids_at, weights_at, slots, experts, spans_P3, weight_S)
    if hit < 0:
        return False
    sum_1D, y_D = np.zeros((1, width), np.float32), bf16_at(y_at, 1, width)[0]
    h_SH, a_SI = np.empty((hit, 2 * inner), np.float32), np.empty((hit, inner), np.uint16)
    gate_up_EHD, down_EDI = bf16_stack_at(gate_up_at, experts, 2 * inner, width), bf16_stack_at(down_at, experts, width, inner)
    x_1D, token_S = bf16_at(x_at, 1, width), np.zeros(hit, np.int64)
    swiglu(x_1D, spans_P3[:hit], token_S, weight_S[:hit], gate_up_EHD, down_EDI, h_SH, a_SI, sum_1D, parts)
    for d in range(width):
        y_D[d] = rounded(sum_1D[0, d])
    return True
