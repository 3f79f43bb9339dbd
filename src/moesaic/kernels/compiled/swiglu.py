"""SwiGLU experts over a few pairs, straight from stacked bf16 weights; see kernels/few_rows.py for when and why.

Shape legend: T tokens, S pairs sorted by expert, P hit experts, E experts, D model width, I inner width, H = 2I. bf16
travels as uint16.
"""

from __future__ import annotations

import numba
import numpy as np

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
