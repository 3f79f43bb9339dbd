"""A few rows times a stored bf16 matrix; see kernels/linear.py for when and why.

Shape legend: T rows, A input width, B output width. bf16 travels as uint16.
"""

from __future__ import annotations

import numba
import numpy as np

from moesaic.kernels.compiled.many import rounded
from moesaic.kernels.compiled.row_dot import row_dot, widen


@numba.njit(parallel=True, cache=True)
def product(x_TA, weight_BA, y_TB, parts):
    """y = x @ weight.T, summed in fp32 and rounded to bf16."""
    outputs = weight_BA.shape[0]
    for part in numba.prange(parts):
        for b in range(outputs * part // parts, outputs * (part + 1) // parts):
            for t in range(x_TA.shape[0]):
                y_TB[t, b] = rounded(row_dot(weight_BA[b], x_TA[t]))


@numba.njit(fastmath=True, inline="always")
def _squares(x_A):
    total = np.float32(0)
    for a in range(x_A.shape[0]):
        value = widen(x_A[a])
        total += value * value
    return total


@numba.njit(error_model="numpy", cache=True)
def norm(x_TA, weight_A, eps, y_TA):
    """y = weight * bf16(x / sqrt(mean of squares + eps)), rounded where transformers' modules round."""
    width = x_TA.shape[1]
    for t in range(x_TA.shape[0]):
        scale = np.float32(1) / np.sqrt(_squares(x_TA[t]) / np.float32(width) + np.float32(eps))
        for a in range(width):
            y_TA[t, a] = rounded(widen(weight_A[a]) * widen(rounded(widen(x_TA[t, a]) * scale)))
