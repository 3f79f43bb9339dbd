"""The gradients of SwiGLU experts over many pairs, straight from stacked bf16 weights; see kernels/many_back.py.

Shape legend: as in compiled/many.py. A packed operand is flat; each span's part begins at its first group. Rows are
packed as [groups of 8][4 columns of 8 rows], pairs as [32 columns][2 rows of 32 columns].
"""

from __future__ import annotations

import numba
import numpy as np

from moesaic.kernels.compiled.broadcast_tile import COLUMNS, pair_lines, sums_of_tile, write_tile
from moesaic.kernels.compiled.many import compiled, exp_of_minus, pack, rounded

PAIR_BYTES = 1 << 18
"""Weight columns paired at a time: a quarter of a core's second-level cache, up to 256 bytes of every row."""

AHEAD = 16
"""Weight rows fetched ahead of those being packed."""


@compiled
def _widened(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@compiled
def _pair_rows(low_A, high_A, out_A):
    """out[a] = both rows' bf16 side by side, as one 32-bit word."""
    for a in range(out_A.shape[0]):
        out_A[a] = np.uint32(low_A[a]) | np.uint32(np.uint32(high_A[a]) << np.uint32(16))


@compiled
def _turn(part, parts, spans_P4, width, rows, turned):
    """Rows and columns of packed rows exchanged: [width / 8][rows of the span / 4][8 columns of 4 rows]."""
    for _, start, end, at in spans_P4:
        groups = (end - start + 7) // 8
        for g in range(groups * part // parts, groups * (part + 1) // parts):
            for block in range(width // 8):
                source, target = (at + g) * 8 * width + block * 64, at * 8 * width + (block * groups + g) * 64
                for half in range(2):
                    for row in range(8):
                        for column in range(4):
                            to = target + row // 4 * 32 + half * 16 + column * 4 + row % 4
                            turned[to] = rows[source + half * 32 + row * 4 + column]


@compiled
def _pair_tokens(part, parts, x_TD, spans_P4, token_S, pairs):
    """Gathered rows of every span as pairs: [width / 32][pairs of rows][32 columns]."""
    width = x_TD.shape[1]
    for _, start, end, at in spans_P4:
        groups = (end - start + 7) // 8
        for pair in range(groups * 4 * part // parts, groups * 4 * (part + 1) // parts):
            low, high = start + 2 * pair, start + 2 * pair + 1
            for block in range(width // COLUMNS):
                to = at * 4 * width + (block * groups * 4 + pair) * COLUMNS
                d = block * COLUMNS
                if high < end:
                    _pair_rows(
                        x_TD[token_S[low], d : d + COLUMNS], x_TD[token_S[high], d : d + COLUMNS], pairs[to : to + COLUMNS]
                    )
                else:
                    for i in range(COLUMNS):
                        pairs[to + i] = np.uint32(x_TD[token_S[low], d + i]) if low < end else np.uint32(0)


@compiled
def blocks_at_once(rows):
    """Of 32 columns and so many rows."""
    return max(1, min(4, PAIR_BYTES // (2 * COLUMNS * rows)))


@compiled
def _pair_weights(weight_BA, low, high, pairs):
    """Columns low : high of a weight matrix as pairs of rows."""
    height, width = weight_BA.shape
    flat = weight_BA.reshape(-1)
    for r in range(height // 2):
        for block in range((high - low) // COLUMNS):
            a = 2 * r * width + low + block * COLUMNS
            pair_lines(flat, a, a + width, AHEAD * width, pairs, (block * height // 2 + r) * COLUMNS)


@compiled
def _through_swiglu(da_32, gate_32, up_32, weight, a_32, d_gate_32, d_up_32):
    """w a, dg and du of 32 columns, and their share of the gradient of w."""
    share = np.float32(0)
    for i in range(COLUMNS):
        gate, up, da = _widened(gate_32[i]), _widened(up_32[i]), da_32[i]
        sigma = np.float32(1) / (np.float32(1) + exp_of_minus(gate))
        silu = gate * sigma
        a = silu * up
        a_32[i] = rounded(weight * a)
        d_up_32[i] = rounded(weight * da * silu)
        d_gate_32[i] = rounded(weight * da * up * (sigma + silu * (np.float32(1) - sigma)))
        da_32[i] = da * a
    for i in range(COLUMNS):
        share += da_32[i]
    return share


@compiled
def _inner(part, parts, spans_P4, weight_S, h_SH, down_EDI, dy, dh, a_pairs, d_weight_S, pairs, sums, a_256, gate_256, up_256):
    """One core's inner columns: da, and from it dh (packed rows), w a (pairs) and a share of dw."""
    width, inner = down_EDI.shape[1:]
    blocks, step = inner // COLUMNS, blocks_at_once(width)
    for expert, start, end, at in spans_P4:
        groups = (end - start + 7) // 8
        for wide in range(blocks * part // parts, blocks * (part + 1) // parts, step):
            many = min(step, blocks * (part + 1) // parts - wide)
            _pair_weights(down_EDI[expert], wide * COLUMNS, (wide + many) * COLUMNS, pairs)
            for g in range(groups):
                for block in range(many):
                    i = (wide + block) * COLUMNS
                    sums_of_tile(dy, (at + g) * 8 * width, pairs, block * width // 2 * COLUMNS, width // 4, sums)
                    for r in range(8):
                        s, row = start + g * 8 + r, slice(r * COLUMNS, (r + 1) * COLUMNS)
                        if s < end:
                            gate_I, up_I = h_SH[s, i:], h_SH[s, inner + i :]
                            out = a_256[row], gate_256[row], up_256[row]
                            d_weight_S[s] += _through_swiglu(sums[row], gate_I, up_I, weight_S[s], *out)
                        else:
                            a_256[row] = 0
                            gate_256[row] = 0
                            up_256[row] = 0
                    for pair in range(4):
                        to = at * 4 * inner + ((wide + block) * groups * 4 + g * 4 + pair) * COLUMNS
                        two = 2 * pair * COLUMNS
                        _pair_rows(a_256[two:], a_256[two + COLUMNS :], a_pairs[to : to + COLUMNS])
                    to = (at + g) * 16 * inner + i * 8
                    for quad in range(8):
                        for r in range(8):
                            for q in range(4):
                                dh[to + quad * 32 + r * 4 + q] = gate_256[r * COLUMNS + quad * 4 + q]
                                dh[to + inner * 8 + quad * 32 + r * 4 + q] = up_256[r * COLUMNS + quad * 4 + q]


@compiled
def _outer(part, parts, spans_P4, token_S, gate_up_EHD, dh, dx_TD, pairs, sums):
    """One core's columns of dx, added to the tokens' in the order of the pairs."""
    height, width = gate_up_EHD.shape[1:]
    blocks, step = width // COLUMNS, blocks_at_once(height)
    for expert, start, end, at in spans_P4:
        groups = (end - start + 7) // 8
        for wide in range(blocks * part // parts, blocks * (part + 1) // parts, step):
            many = min(step, blocks * (part + 1) // parts - wide)
            _pair_weights(gate_up_EHD[expert], wide * COLUMNS, (wide + many) * COLUMNS, pairs)
            for g in range(groups):
                for block in range(many):
                    d = (wide + block) * COLUMNS
                    sums_of_tile(dh, (at + g) * 8 * height, pairs, block * height // 2 * COLUMNS, height // 4, sums)
                    for r in range(min(8, end - start - 8 * g)):
                        dx_D = dx_TD[token_S[start + 8 * g + r], d : d + COLUMNS]
                        for i in range(COLUMNS):
                            dx_D[i] += sums[r * COLUMNS + i]


@compiled
def _weights(part, parts, spans_P4, turned, pairs, d_weight_EBA):
    """One core's rows of a weight's gradient: rows' columns times the other rows' columns, summed over a span's pairs."""
    height, width = d_weight_EBA.shape[1:]
    for expert, start, end, at in spans_P4:
        groups = (end - start + 7) // 8
        out_A = d_weight_EBA[expert].reshape(-1)
        for block in range(height // 8 * part // parts, height // 8 * (part + 1) // parts):
            for column in range(width // COLUMNS):
                row_at = at * 8 * height + block * groups * 64
                pair_at = at * 4 * width + column * groups * 4 * COLUMNS
                out_at = block * 8 * width + column * COLUMNS
                write_tile(turned, row_at, pairs, pair_at, groups * 2, out_A, out_at, width)


@numba.njit(parallel=True, error_model="numpy", cache=True)
def swiglu_back(
    spans_P4, token_S, weight_S, x_TD, dy_TQ, h_SH, gate_up_EHD, down_EDI,
    dy_GQ, dy, dy_turned, x_pairs, dh, dh_turned, a_pairs, pairs_C, sums_C, small_C,
    dx_TD, d_weight_CS, d_gate_up_EHD, d_down_EDI,
):  # fmt: skip
    """Add to dx and to every core's share of dw, and write the hit experts' weight gradients."""
    parts = sums_C.shape[0]
    width, height = down_EDI.shape[1], gate_up_EHD.shape[1]
    for part in numba.prange(parts):
        pack(part, parts, dy_TQ, spans_P4, token_S, dy_GQ)
        _turn(part, parts, spans_P4, width, dy, dy_turned)
        _pair_tokens(part, parts, x_TD, spans_P4, token_S, x_pairs)
    for part in numba.prange(parts):
        _inner(
            part, parts, spans_P4, weight_S, h_SH, down_EDI, dy, dh, a_pairs, d_weight_CS[part],
            pairs_C[part], sums_C[part], small_C[part, 0], small_C[part, 1], small_C[part, 2],
        )  # fmt: skip
    for part in numba.prange(parts):
        _turn(part, parts, spans_P4, height, dh, dh_turned)
        _outer(part, parts, spans_P4, token_S, gate_up_EHD, dh, dx_TD, pairs_C[part], sums_C[part])
    for part in numba.prange(parts):
        _weights(part, parts, spans_P4, dy_turned, a_pairs, d_down_EDI)
        _weights(part, parts, spans_P4, dh_turned, x_pairs, d_gate_up_EHD)
