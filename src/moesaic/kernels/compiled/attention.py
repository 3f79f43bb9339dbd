"""One query per sequence against its cached keys and values; see kernels/attention.py for when and why.

Shape legend: B sequences, H query heads, G key-value heads, S cached positions, W head width. bf16 travels as uint16.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from moesaic.kernels.compiled.many import rounded
from moesaic.kernels.compiled.row_dot import row_dot, widen


@numba.njit(fastmath={"contract", "reassoc"}, inline="always")
def _add(value_W, weight, sum_W):
    for w in range(sum_W.shape[0]):
        sum_W[w] += weight * widen(value_W[w])


@numba.njit(parallel=True, error_model="numpy", fastmath={"contract"}, cache=True)
def attend(q_BHW, k_BGSW, v_BGSW, scale, score_BHS, sum_BHW, y_BHW):
    """y = softmax(scale * q @ k.T) @ v per head, in fp32 inside; query heads share key-value heads in consecutive groups."""
    heads, groups, length, width = q_BHW.shape[1], k_BGSW.shape[1], k_BGSW.shape[2], q_BHW.shape[2]
    each = heads // groups
    for job in numba.prange(q_BHW.shape[0] * groups):
        b, g = job // groups, job % groups
        for s in range(length):  # a key is read once for all heads that share it
            for h in range(g * each, g * each + each):
                score_BHS[b, h, s] = row_dot(k_BGSW[b, g, s], q_BHW[b, h]) * scale
        for h in range(g * each, g * each + each):
            most = score_BHS[b, h, 0]
            for s in range(length):
                most = max(most, score_BHS[b, h, s])
            total = np.float32(0)
            for s in range(length):
                score = np.float32(math.exp(score_BHS[b, h, s] - most))
                score_BHS[b, h, s] = score
                total += score
            for s in range(length):
                score_BHS[b, h, s] /= total
            for w in range(width):
                sum_BHW[b, h, w] = np.float32(0)
        for s in range(length):
            for h in range(g * each, g * each + each):
                _add(v_BGSW[b, g, s], score_BHS[b, h, s], sum_BHW[b, h])
        for h in range(g * each, g * each + each):
            for w in range(width):
                y_BHW[b, h, w] = rounded(sum_BHW[b, h, w])
