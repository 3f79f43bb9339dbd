"""A few rows times a stored bf16 matrix, and their norms; see kernels/linear.py for when and why.

Shape legend: T rows, A input width, B output width. Arguments ending in `_at` are addresses of contiguous bf16.
"""

from __future__ import annotations

import numba
import numpy as np

from moesaic.kernels.compiled.at import bf16_at
from moesaic.kernels.compiled.many import rounded
from moesaic.kernels.compiled.row_dot import row_dot, widen


@numba.njit(parallel=True, cache=True)
def product(x_at, weight_at, y_at, rows, width, outputs, parts):
    """y [T, B] = x [T, A] @ weight [B, A].T, summed in fp32 and rounded to bf16."""
    x_TA, weight_BA, y_TB = bf16_at(x_at, rows, width), bf16_at(weight_at, outputs, width), bf16_at(y_at, rows, outputs)
    for part in numba.prange(parts):
        for b in range(outputs * part // parts, outputs * (part + 1) // parts):
            for t in range(rows):
                y_TB[t, b] = rounded(row_dot(weight_BA[b], x_TA[t]))


@numba.njit(fastmath=True, inline="always")
def _squares(x_A):
    total = np.float32(0)
    for a in range(x_A.shape[0]):
        value = widen(x_A[a])
        total += value * value
    return total


@numba.njit(error_model="numpy", cache=True)
def norm(x_at, weight_at, y_at, rows, width, eps):
    """y = weight * bf16(x / sqrt(mean of squares + eps)) for each row, rounded where transformers' modules round."""
    x_TA, weight_A, y_TA = bf16_at(x_at, rows, width), bf16_at(weight_at, 1, width)[0], bf16_at(y_at, rows, width)
    for t in range(rows):
        scale = np.float32(1) / np.sqrt(_squares(x_TA[t]) / np.float32(width) + np.float32(eps))
        for a in range(width):
            y_TA[t, a] = rounded(widen(weight_A[a]) * widen(rounded(widen(x_TA[t, a]) * scale)))
