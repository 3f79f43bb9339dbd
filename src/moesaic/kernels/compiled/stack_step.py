"""One decoding step of a stack of decoder layers as one pass; see kernels/stack_step.py.

Shape legend: L layers, D model width, E experts, K slots, F packings. Columns of `layers_LC`, addresses and flags of a layer:
0 and 1 its two norms, 2 and 3 the norms of queries and keys (0: none), 4 the router's matrix, 5 and 6 the caches of keys
and values, 7 and 8 gate_up and down in bf16 (0: experts are codes, see `table_LE6`), 9 the room of its caches in positions.
"""

from __future__ import annotations

import numba

from moesaic.kernels.compiled import codes, swiglu
from moesaic.kernels.compiled.at import bf16_at, fp32_at
from moesaic.kernels.compiled.attention_step import step as attention_step
from moesaic.kernels.compiled.many import rounded
from moesaic.kernels.compiled.route import softmax_topk
from moesaic.kernels.compiled.row_dot import widen
from moesaic.kernels.compiled.rows_by_matrix import norm

bf16_experts, code_experts = swiglu.one_token, codes.one_token


@numba.njit(inline="always")
def _add(x_at, y_at, width):
    x_D, y_D = bf16_at(x_at, 1, width)[0], bf16_at(y_at, 1, width)[0]
    for d in range(width):
        x_D[d] = rounded(widen(x_D[d]) + widen(y_D[d]))


@numba.njit(error_model="numpy", cache=True)
def run(
    x_at, layers_LC, matrices_L46, table_LE6, forms_F4, words, x_words, a_words, a_stride, norm_heads, eps, head_eps, cos_at,
    sin_at, length, heads, groups, head_width, dim, scale, experts, slots, inner, normalise, round_weights, held_at,
    logits_at, weights_at, ids_at, parts,
):  # fmt: skip
    """x [D], in place, through every layer. `held_at`: room for two rows and for what attention_step holds."""
    normed_at, y_at, attention_at = held_at, held_at + 2 * dim, held_at + 4 * dim
    for layer in range(layers_LC.shape[0]):
        at = layers_LC[layer]
        norm(x_at, at[0], normed_at, 1, dim, eps)
        attention_step(
            normed_at, matrices_L46[layer], words, at[2], at[3], norm_heads, head_eps, cos_at, sin_at, at[5], at[6], at[9],
            length, heads, groups, head_width, dim, scale, attention_at, y_at, parts,
        )  # fmt: skip
        _add(x_at, y_at, dim)
        norm(x_at, at[1], normed_at, 1, dim, eps)
        softmax_topk(normed_at, at[4], dim, experts, slots, normalise, logits_at, weights_at, ids_at, parts)
        if round_weights:
            weights_K = fp32_at(weights_at, 1, slots)[0]
            for k in range(slots):
                weights_K[k] = widen(rounded(weights_K[k]))
        if at[7]:
            bf16_experts(normed_at, ids_at, weights_at, at[7], at[8], y_at, slots, experts, dim, inner, parts)
        else:
            code_experts(
                normed_at, ids_at, weights_at, slots, table_LE6[layer], forms_F4, x_words, a_words, a_stride, inner, dim, y_at,
                parts,
            )  # fmt: skip
        _add(x_at, y_at, dim)
