"""One decoding step of a whole attention module as one pass; see kernels/attention_step.py.

Shape legend: H query heads, G key-value heads, W head width, D model width, S cached positions with this one. Arguments
ending in `_at` are addresses of contiguous bf16 (norms: 0 for none); matrices as in stored_matrix.py. Numbers are rounded to
bf16 where transformers' modules round them.
"""

from __future__ import annotations

import numba
import numpy as np

from moesaic.kernels.compiled.at import bf16_at
from moesaic.kernels.compiled.attention import attend_group
from moesaic.kernels.compiled.many import rounded
from moesaic.kernels.compiled.row_dot import widen
from moesaic.kernels.compiled.stored_matrix import prepare, share

compiled = numba.njit(error_model="numpy", fastmath={"contract"})


@compiled
def _norm(row_A, weight_A, eps):
    """In place: weight * bf16(x / sqrt(mean of squares + eps))."""
    total = np.float32(0)
    for a in range(row_A.shape[0]):
        value = widen(row_A[a])
        total += value * value
    scale = np.float32(1) / np.sqrt(total / np.float32(row_A.shape[0]) + np.float32(eps))
    for a in range(row_A.shape[0]):
        row_A[a] = rounded(widen(weight_A[a]) * widen(rounded(widen(row_A[a]) * scale)))


@numba.njit(error_model="numpy")  # products are rounded apart, as PyTorch's operations are
def _rotate(row_W, cos_W, sin_W):
    """Rotary position, in place: x * cos + (-second half, first half) * sin."""
    half = row_W.shape[0] // 2
    for w in range(half):
        low, high = widen(row_W[w]), widen(row_W[w + half])
        first = widen(rounded(low * widen(cos_W[w]))) + widen(rounded(-high * widen(sin_W[w])))
        second = widen(rounded(high * widen(cos_W[w + half]))) + widen(rounded(low * widen(sin_W[w + half])))
        row_W[w], row_W[w + half] = rounded(first), rounded(second)


@numba.njit(parallel=True, error_model="numpy", cache=True)
def step(
    x_at, matrices_46, words, q_norm_at, k_norm_at, norm_heads, eps, cos_at, sin_at, keys_at, values_at, room, length,
    heads, groups, width, dim, scale, held_at, y_at, parts,
):  # fmt: skip
    """y [D] of one token, whose key and value are written to position `length` - 1 of caches [G, room, W].

    `norm_heads`: the q and k norms are per head (of width W), else over all heads at once. `held_at`: room for 2 H + 2 G heads.
    """
    inner, kv = heads * width, groups * width
    q_at, k_at, v_at, mixed_at = held_at, held_at + 2 * inner, held_at + 2 * (inner + kv), held_at + 2 * (inner + 2 * kv)
    prepare(x_at, 1, dim, matrices_46[0], words)
    prepared_at = words.ctypes.data
    for part in numba.prange(parts):
        share(part, parts, x_at, 1, dim, matrices_46[0], inner, prepared_at, q_at)
        share(part, parts, x_at, 1, dim, matrices_46[1], kv, prepared_at, k_at)
        share(part, parts, x_at, 1, dim, matrices_46[2], kv, prepared_at, v_at)
    q_HW, k_GW, v_GW = bf16_at(q_at, heads, width), bf16_at(k_at, groups, width), bf16_at(v_at, groups, width)
    if q_norm_at and not norm_heads:
        _norm(bf16_at(q_at, 1, inner)[0], bf16_at(q_norm_at, 1, inner)[0], eps)
        _norm(bf16_at(k_at, 1, kv)[0], bf16_at(k_norm_at, 1, kv)[0], eps)
    cos_W, sin_W = bf16_at(cos_at, 1, width)[0], bf16_at(sin_at, 1, width)[0]
    each, mixed_HW = heads // groups, bf16_at(mixed_at, heads, width)
    for g in numba.prange(groups):
        k_SW, v_SW = (
            bf16_at(keys_at + 2 * g * room * width, length, width),
            bf16_at(values_at + 2 * g * room * width, length, width),
        )
        if q_norm_at and norm_heads:
            _norm(k_GW[g], bf16_at(k_norm_at, 1, width)[0], eps)
        _rotate(k_GW[g], cos_W, sin_W)
        k_SW[length - 1] = k_GW[g]
        v_SW[length - 1] = v_GW[g]
        low, high = g * each, g * each + each
        for h in range(low, high):
            if q_norm_at and norm_heads:
                _norm(q_HW[h], bf16_at(q_norm_at, 1, width)[0], eps)
            _rotate(q_HW[h], cos_W, sin_W)
        score_HS, sum_HW = np.empty((each, length), np.float32), np.empty((each, width), np.float32)
        attend_group(q_HW[low:high], k_SW, v_SW, np.float32(scale), score_HS, sum_HW, mixed_HW[low:high])
    prepare(mixed_at, 1, inner, matrices_46[3], words)
    for part in numba.prange(parts):
        share(part, parts, mixed_at, 1, inner, matrices_46[3], dim, prepared_at, y_at)
