"""SwiGLU experts over a few pairs, straight from records of codes at any addresses; see kernels/quantized.py.

Shape legend: T tokens, S pairs sorted by expert, P hit experts, F packings in use, D model width, I inner width. Rows of
`table_P6` are an expert's addresses (gate_up's codes and scales, down's codes and scales) and its two packings, as rows of
`forms_F4`: (kind of code_dot.py, bits, group size, shift from a unit to its group). bf16 activations come as fp32.
"""

from __future__ import annotations

import numba
import numpy as np

from moesaic.kernels.compiled.at import bf16_at
from moesaic.kernels.compiled.choice import sorted_choice
from moesaic.kernels.compiled.code_dot import LANES, ROWS, dot
from moesaic.kernels.compiled.many import rounded
from moesaic.kernels.compiled.row_dot import widen

compiled = numba.njit(error_model="numpy")

MOST = 32767
"""Of a 16-bit integer."""


@compiled
def row_bytes(columns, bits):
    """Of a prepared row of activations: for every unit its planes, the levels' offset and the scales."""
    return columns // (LANES * 8 // bits) * (8 // bits + 2) * 64


@compiled
def prepare_row(row_A, bits, size, at, words, ints, floats):
    """Activations as code_dot.py wants them, from byte `at` of a buffer that is seen as three types."""
    planes, step = 8 // bits, 2 if bits == 2 else 1
    first = -3 if bits == 2 else -(1 << (bits - 1))
    for low in range(0, row_A.shape[0], size):
        high = min(low + size, row_A.shape[0])
        peak, finite = np.float32(0), True
        for a in range(low, high):
            value = abs(row_A[a])
            peak = max(peak, value)
            finite = finite and value < np.float32(np.inf)
        # The codes' step goes to the activations, which then have a bit less.
        scale = peak / np.float32(MOST // step)
        inverse = np.float32(1) / scale if scale > 0 and finite else np.float32(0)
        if not finite:
            scale = np.float32(np.nan)
        for lane in range(low // (2 * planes), high // (2 * planes)):
            unit, l = at + lane // 16 * (planes + 2) * 64, lane % 16
            total = np.int32(0)
            for half in range(2):
                for plane in range(planes):
                    level = np.int32(0)
                    if inverse > 0:
                        level = np.int32(np.rint(row_A[(2 * lane + half) * planes + plane] * inverse))
                    words[(unit + plane * 64) // 2 + 2 * l + half] = np.int16(level * step)
                    total += level
            ints[(unit + planes * 64) // 4 + l] = first * total
            floats[(unit + planes * 64 + 64) // 4 + l] = scale


@numba.njit(error_model="numpy")
def four_rows(kind, codes_4, scale_4, x_4, count, units, shift, out):
    dot(kind * 3 + min(count - 1, 2), codes_4, scale_4, x_4, units, shift, out)


@compiled
def at_once(left):
    return 4 if left >= 4 else 2 if left >= 2 else 1


@compiled
def _inner(part, parts, spans_P3, token_S, table_P6, forms_F4, x_at, a_SI, width):
    """One core's inner columns of every pair."""
    inner = a_SI.shape[1]
    codes_4, scale_4, x_4, out = np.empty(4, np.int64), np.empty(4, np.int64), np.empty(4, np.int64), np.empty(16, np.float32)
    for p in range(spans_P3.shape[0]):
        form, (_, start, end) = table_P6[p, 4], spans_P3[p]
        kind, bits, size, shift = forms_F4[form]
        units, code_row, scale_row, x_row = (
            width // (LANES * 8 // bits),
            width * bits // 8,
            -(-width // size) * 2,
            row_bytes(width, bits),
        )
        for i in range(inner // 2 * part // parts * 2, inner // 2 * (part + 1) // parts * 2, 2):
            for w in range(4):
                row = i + w % 2 + w // 2 * inner
                codes_4[w] = table_P6[p, 0] + row * code_row
                scale_4[w] = table_P6[p, 1] + row * scale_row
            s = start
            while s < end:
                count = at_once(end - s)
                for x in range(count):
                    x_4[x] = x_at[form] + token_S[s + x] * x_row
                four_rows(kind, codes_4, scale_4, x_4, count, units, shift, out)
                for x in range(count):
                    for w in range(2):
                        gate = out[4 * x + w]
                        a_SI[s + x, i + w] = gate / (np.float32(1) + np.exp(-gate)) * out[4 * x + w + 2]
                s += count


@compiled
def _outer(part, parts, spans_P3, token_S, weight_S, table_P6, forms_F4, a_at, a_stride, inner, y_TD):
    """One core's output columns, added to the tokens' in the order of the pairs."""
    width = y_TD.shape[1]
    codes_4, scale_4, x_4, out = np.empty(4, np.int64), np.empty(4, np.int64), np.empty(4, np.int64), np.empty(16, np.float32)
    for p in range(spans_P3.shape[0]):
        form, (_, start, end) = table_P6[p, 5], spans_P3[p]
        kind, bits, size, shift = forms_F4[form]
        units, code_row, scale_row = inner // (LANES * 8 // bits), inner * bits // 8, -(-inner // size) * 2
        for d in range(width // 4 * part // parts * 4, width // 4 * (part + 1) // parts * 4, ROWS):
            for w in range(4):
                codes_4[w] = table_P6[p, 2] + (d + w) * code_row
                scale_4[w] = table_P6[p, 3] + (d + w) * scale_row
            s = start
            while s < end:
                count = at_once(end - s)
                for x in range(count):
                    x_4[x] = a_at + (s + x - spans_P3[0, 1]) * a_stride
                four_rows(kind, codes_4, scale_4, x_4, count, units, shift, out)
                for x in range(count):
                    y_D, weight = y_TD[token_S[s + x]], weight_S[s + x]
                    for w in range(4):
                        y_D[d + w] += weight * out[4 * x + w]
                s += count


@numba.njit(parallel=True, error_model="numpy", cache=True)
def swiglu(x_TD, spans_P3, token_S, weight_S, table_P6, forms_F4, x_words, a_words, a_stride, a_SI, y_TD, parts):
    """Add to y the weighted outputs of every pair."""
    tokens, width = x_TD.shape
    inner = a_SI.shape[1]
    x_ints, x_floats = x_words.view(np.int32), x_words.view(np.float32)
    a_ints, a_floats = a_words.view(np.int32), a_words.view(np.float32)
    first = spans_P3[0, 1]
    x_from = np.empty(forms_F4.shape[0], np.int64)
    at = 0
    for f in range(forms_F4.shape[0]):
        x_from[f] = at
        at += tokens * row_bytes(width, forms_F4[f, 1])
    for job in numba.prange(forms_F4.shape[0] * tokens):
        f, t = job // tokens, job % tokens
        prepare_row(
            x_TD[t], forms_F4[f, 1], forms_F4[f, 2], x_from[f] + t * row_bytes(width, forms_F4[f, 1]), x_words, x_ints, x_floats
        )
    x_at = x_from + x_words.ctypes.data
    for part in numba.prange(parts):
        _inner(part, parts, spans_P3, token_S, table_P6, forms_F4, x_at, a_SI, width)
    for p in numba.prange(spans_P3.shape[0]):
        form = forms_F4[table_P6[p, 5]]
        for s in range(spans_P3[p, 1], spans_P3[p, 2]):
            prepare_row(a_SI[s], form[1], form[2], (s - first) * a_stride, a_words, a_ints, a_floats)
    for part in numba.prange(parts):
        _outer(part, parts, spans_P3, token_S, weight_S, table_P6, forms_F4, a_words.ctypes.data, a_stride, inner, y_TD)


@numba.njit(error_model="numpy", cache=True)
def one_token(x_at, ids_at, weights_at, slots, table_E6, forms_F4, x_words, a_words, a_stride, inner, width, y_at, parts):
    """bf16 y [D] of one bf16 token from its chosen experts, ids int64 and weights fp32 [K]: what swiglu gives, in one call.

    False, and nothing done, where an expert is chosen twice or none is.
    """
    spans_P3, weight_S = np.empty((slots, 3), np.int64), np.empty(slots, np.float32)
    hit = sorted_choice(ids_at, weights_at, slots, table_E6.shape[0], spans_P3, weight_S)
    if hit < 1:
        return False
    table_P6 = np.empty((hit, 6), np.int64)
    for p in range(hit):
        table_P6[p] = table_E6[spans_P3[p, 0]]
    x_D, y_D = bf16_at(x_at, 1, width)[0], bf16_at(y_at, 1, width)[0]
    x_1D, sum_1D, a_SI = np.empty((1, width), np.float32), np.zeros((1, width), np.float32), np.empty((hit, inner), np.float32)
    for d in range(width):
        x_1D[0, d] = widen(x_D[d])
    token_S = np.zeros(hit, np.int64)
    swiglu(x_1D, spans_P3[:hit], token_S, weight_S[:hit], table_P6, forms_F4, x_words, a_words, a_stride, a_SI, sum_1D, parts)
    for d in range(width):
        y_D[d] = rounded(sum_1D[0, d])
    return True
