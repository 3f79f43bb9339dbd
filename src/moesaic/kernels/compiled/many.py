"""SwiGLU experts over many pairs, straight from stacked bf16 weights; see kernels/many_rows.py for when and why.

Shape legend: T tokens, S pairs sorted by expert, P pieces (at most some hundred pairs of one expert), G groups of 8
packed rows, E experts, D model width, I inner width, H = 2I. bf16 travels as uint16.
"""

from __future__ import annotations

import numba
import numpy as np

from moesaic.kernels.compiled.tile import GROUP, tile1, tile2, tile3

BAND = 8
"""Tiles whose outputs are put into a pair's or a token's row at once: whole cache lines."""

compiled = numba.njit(fastmath={"contract"}, error_model="numpy")


@compiled
def _tiles(rows_GA, groups, first_4A, second_4A, ahead, out_G64):
    """Four and four weight rows times all rows of a piece, as few groups at a time as keeps the last tile wide."""
    g = 0
    while g < groups:
        left = groups - g
        if left == 3 or left > 4:
            tile3(rows_GA[g:], first_4A, second_4A, ahead, out_G64[g:])
            g += 3
        elif left > 1:
            tile2(rows_GA[g:], first_4A, second_4A, ahead, out_G64[g:])
            g += 2
        else:
            tile1(rows_GA[g:], first_4A, second_4A, ahead, out_G64[g:])
            g += 1


@compiled
def rounded(value):
    """fp32 to bf16, to nearest even."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled
def exp_of_minus(value):
    """exp(-value) to fp32's last bits, as 2^n times a polynomial: a call of the library's would keep the loops that use it
    from becoming vector instructions."""
    power = min(max(value * np.float32(-1.4426950408889634), np.float32(-126)), np.float32(126))
    whole = np.rint(power)
    part = power - whole
    root = np.float32(0.00015403530393381608)
    root = root * part + np.float32(0.0013333558146428443)
    root = root * part + np.float32(0.009618129107628477)
    root = root * part + np.float32(0.05550410866482158)
    root = root * part + np.float32(0.24022650695910072)
    root = root * part + np.float32(0.6931471805599453)
    root = root * part + np.float32(1)
    return root * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled
def _activate(sums_64, a_32):
    """silu(gate) * up; the sums hold 32 gates, then 32 ups."""
    for i in range(32):
        gate = sums_64[i]
        a_32[i] = rounded(sums_64[i + 32] * gate / (np.float32(1) + exp_of_minus(gate)))


@compiled
def pack(part, parts, x_TQ, pieces_P4, token_S, x_GQ):
    """One core's share of gathering rows into groups: 4 columns (a 64-bit word) of each of 8 rows, then the next 4."""
    for _, start, end, at in pieces_P4:
        groups = (end - start + GROUP - 1) // GROUP
        for g in range(groups * part // parts, groups * (part + 1) // parts):
            for r in range(GROUP):
                s = start + g * GROUP + r
                if s < end:
                    row_Q = x_TQ[token_S[s]]
                    for q in range(row_Q.shape[0]):
                        x_GQ[at + g, q * GROUP + r] = row_Q[q]
                else:
                    for q in range(x_TQ.shape[1]):
                        x_GQ[at + g, q * GROUP + r] = 0


@compiled
def _inner(part, parts, pieces_P4, gate_up_EHD, x_GD, a_GI, h_SH, sums_BG64):
    """One core's inner columns of every pair, packed as the rows were; and h, if there is room for it."""
    inner, width = gate_up_EHD.shape[1] // 2, gate_up_EHD.shape[2]
    stop = inner // 4 * (part + 1) // parts * 4
    for expert, start, end, at in pieces_P4:
        groups = (end - start + GROUP - 1) // GROUP
        for low in range(inner // 4 * part // parts * 4, stop, 4 * BAND):
            tiles = min(BAND, (stop - low) // 4)
            for b in range(tiles):
                i = low + 4 * b
                gate_4D, up_4D = gate_up_EHD[expert, i : i + 4], gate_up_EHD[expert, inner + i : inner + i + 4]
                _tiles(x_GD[at:], groups, gate_4D, up_4D, 8 * width, sums_BG64[b])
                for g in range(groups):
                    _activate(sums_BG64[b, g], a_GI[at + g, GROUP * i : GROUP * (i + 4)])
            for s in range(start, min(end, h_SH.shape[0])):
                gate_I, up_I = h_SH[s, low:], h_SH[s, inner + low :]
                g, r = (s - start) // GROUP, (s - start) % GROUP
                for b in range(tiles):
                    for i in range(4):
                        gate_I[4 * b + i] = rounded(sums_BG64[b, g, 4 * r + i])
                    for i in range(4):
                        up_I[4 * b + i] = rounded(sums_BG64[b, g, 4 * r + 32 + i])


@compiled
def _outer(part, parts, pieces_P4, token_S, weight_S, down_EDI, a_GI, y_TD, sums_BG64):
    """One core's output columns, added to the tokens' in the order of the pairs."""
    width, inner = down_EDI.shape[1:]
    stop = width // 8 * (part + 1) // parts * 8
    for expert, start, end, at in pieces_P4:
        groups = (end - start + GROUP - 1) // GROUP
        for low in range(width // 8 * part // parts * 8, stop, 8 * BAND):
            tiles = min(BAND, (stop - low) // 8)
            for b in range(tiles):
                d = low + 8 * b
                _tiles(
                    a_GI[at:], groups, down_EDI[expert, d : d + 4], down_EDI[expert, d + 4 : d + 8], 16 * inner, sums_BG64[b]
                )
            for s in range(start, end):
                y_D, weight = y_TD[token_S[s]], weight_S[s]
                g, r = (s - start) // GROUP, (s - start) % GROUP
                for b in range(tiles):
                    sums_64, d = sums_BG64[b, g], low + 8 * b
                    for i in range(4):
                        y_D[d + i] += weight * sums_64[4 * r + i]
                    for i in range(4):
                        y_D[d + 4 + i] += weight * sums_64[4 * r + 32 + i]


@numba.njit(parallel=True, error_model="numpy", cache=True)
def swiglu(x_TQ, pieces_P4, token_S, weight_S, gate_up_EHD, down_EDI, x_GQ, x_GD, a_GI, sums_CBG64, h_SH, y_TD):
    """Add to y the weighted outputs of every pair. `pieces_P4` rows are (expert, first pair, end pair, first group);
    `x_TQ` and `x_GQ` are 64-bit views of bf16 rows, there is a block of sums for every core, and h may have no rows."""
    parts = sums_CBG64.shape[0]
    for part in numba.prange(parts):
        pack(part, parts, x_TQ, pieces_P4, token_S, x_GQ)
    for part in numba.prange(parts):
        _inner(part, parts, pieces_P4, gate_up_EHD, x_GD, a_GI, h_SH, sums_CBG64[part])
    for part in numba.prange(parts):
        _outer(part, parts, pieces_P4, token_S, weight_S, down_EDI, a_GI, y_TD, sums_CBG64[part])
