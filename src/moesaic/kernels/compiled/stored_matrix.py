"""A few rows times one stored matrix, of bf16 or of codes; see kernels/stored_matrix.py.

Shape legend: T rows, A input width, B output width. A matrix travels as six integers: (bits, address of the weights or
codes, address of the scales, kind of code_dot.py, group size, shift from a unit to its group); bf16 is 16 bits and zeros.
Arguments ending in `_at` are addresses of contiguous bf16.
"""

from __future__ import annotations

import numba
import numpy as np

from moesaic.kernels.compiled.at import bf16_at
from moesaic.kernels.compiled.code_dot import LANES, ROWS
from moesaic.kernels.compiled.codes import at_once, four_rows, prepare_row, row_bytes
from moesaic.kernels.compiled.many import rounded
from moesaic.kernels.compiled.row_dot import row_dot, widen

compiled = numba.njit(error_model="numpy")


@compiled
def prepare(x_at, rows, width, matrix_6, words):
    """Activations as the matrix's codes want them; nothing for bf16."""
    if matrix_6[0] == 16:
        return
    x_TA, wide_A = bf16_at(x_at, rows, width), np.empty(width, np.float32)
    ints, floats = words.view(np.int32), words.view(np.float32)
    for t in range(rows):
        for a in range(width):
            wide_A[a] = widen(x_TA[t, a])
        prepare_row(wide_A, matrix_6[0], matrix_6[4], t * row_bytes(width, matrix_6[0]), words, ints, floats)


@compiled
def share(part, parts, x_at, rows, width, matrix_6, outputs, prepared_at, y_at):
    """One core's outputs of y [T, B] = x [T, A] @ matrix [B, A].T, summed in fp32 and rounded to bf16."""
    y_TB, bits = bf16_at(y_at, rows, outputs), matrix_6[0]
    if bits == 16:
        x_TA, weight_BA = bf16_at(x_at, rows, width), bf16_at(matrix_6[1], outputs, width)
        for b in range(outputs * part // parts, outputs * (part + 1) // parts):
            for t in range(rows):
                y_TB[t, b] = rounded(row_dot(weight_BA[b], x_TA[t]))
        return
    units, code_row, scale_row = width // (LANES * 8 // bits), width * bits // 8, -(-width // matrix_6[4]) * 2
    x_row = row_bytes(width, bits)
    codes_4, scale_4, x_4, out = np.empty(4, np.int64), np.empty(4, np.int64), np.empty(4, np.int64), np.empty(16, np.float32)
    for b in range(outputs // ROWS * part // parts * ROWS, outputs // ROWS * (part + 1) // parts * ROWS, ROWS):
        for w in range(ROWS):
            codes_4[w] = matrix_6[1] + (b + w) * code_row
            scale_4[w] = matrix_6[2] + (b + w) * scale_row
        t = 0
        while t < rows:
            count = at_once(rows - t)
            for x in range(count):
                x_4[x] = prepared_at + (t + x) * x_row
            four_rows(matrix_6[3], codes_4, scale_4, x_4, count, units, matrix_6[5], out)
            for x in range(count):
                for w in range(ROWS):
                    y_TB[t + x, b + w] = rounded(out[ROWS * x + w])
            t += count


@numba.njit(parallel=True, error_model="numpy", cache=True)
def product(x_at, rows, width, matrix_6, outputs, words, y_at, parts):
    """y [T, B] = x [T, A] @ matrix.T; `words` holds prepared activations, 64-byte aligned."""
    prepare(x_at, rows, width, matrix_6, words)
    prepared_at = words.ctypes.data
    for part in numba.prange(parts):
        share(part, parts, x_at, rows, width, matrix_6, outputs, prepared_at, y_at)
