"""One query per sequence against its cached keys and values; see kernels/attention.py for when and why.

Shape legend: B sequences, H query heads, G key-value heads, S cached positions, W head width. bf16 travels as uint16.
"""

from __future__ import annotations

import numba
import numpy as np

from moesaic.kernels.compiled.many import exp_of_minus, rounded
from moesaic.kernels.compiled.row_dot import row_dot, widen


@numba.njit(fastmath={"contract", "reassoc"}, inline="always")
def _add(value_W, weight, sum_W):
    for w in range(sum_W.shape[0]):
        sum_W[w] += weight * widen(value_W[w])


@numba.njit(error_model="numpy", fastmath={"contract"})
def attend_group(q_HW, k_SW, v_SW, scale, score_HS, sum_HW, y_HW):
    """y = softmax(scale * q @ k.T) @ v of the query heads that share these keys and values, in fp32 inside."""
    heads, length, width = q_HW.shape[0], k_SW.shape[0], k_SW.shape[1]
    for s in range(length):  # a key is read once for all heads that share it
        for h in range(heads):
            score_HS[h, s] = row_dot(k_SW[s], q_HW[h]) * scale
    for h in range(heads):
        most = score_HS[h, 0]
        for s in range(length):
            most = max(most, score_HS[h, s])
        total = np.float32(0)
        for s in range(length):
            below = most - score_HS[h, s]
            score_HS[h, s] = exp_of_minus(below) + (below - below)  # nothing, but for what is not finite
            total += score_HS[h, s]
        for s in range(length):
            score_HS[h, s] /= total
        for w in range(width):
            sum_HW[h, w] = np.float32(0)
    for s in range(length):
        for h in range(heads):
            _add(v_SW[s], score_HS[h, s], sum_HW[h])
    for h in range(heads):
        for w in range(width):
            y_HW[h, w] = rounded(sum_HW[h, w])


@numba.njit(parallel=True, error_model="numpy", cache=True)
def attend(q_BHW, k_BGSW, v_BGSW, scale, score_BHS, sum_BHW, y_BHW):
    """Query heads share key-value heads in consecutive groups."""
    groups = k_BGSW.shape[1]
    each = q_BHW.shape[1] // groups
    for job in numba.prange(q_BHW.shape[0] * groups):
        b, g = job // groups, job % groups
        low, high = g * each, g * each + each
        attend_group(
            q_BHW[b, low:high], k_BGSW[b, g], v_BGSW[b, g], scale,
            score_BHS[b, low:high], sum_BHW[b, low:high], y_BHW[b, low:high],
        )  # fmt: skip
