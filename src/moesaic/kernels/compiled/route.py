"""One token's scores and its K best experts as one pass; see kernels/route.py.

Shape legend: D model width, E experts, K slots. Arguments ending in `_at` are addresses.
"""

from __future__ import annotations

import numba
import numpy as np

from moesaic.kernels.compiled.at import bf16_at, fp32_at, int64_at
from moesaic.kernels.compiled.many import rounded
from moesaic.kernels.compiled.row_dot import row_dot, widen


@numba.njit(parallel=True, error_model="numpy", cache=True)
def softmax_topk(x_at, weight_at, width, experts, slots, normalise, logits_at, weights_at, ids_at, parts):
    """Logits bf16 [E], weights fp32 [K] in falling order (equal ones by rising id), ids int64 [K]."""
    x_D, weight_ED, logits_E = bf16_at(x_at, 1, width)[0], bf16_at(weight_at, experts, width), bf16_at(logits_at, 1, experts)[0]
    for part in numba.prange(parts):
        for e in range(experts * part // parts, experts * (part + 1) // parts):
            logits_E[e] = rounded(row_dot(weight_ED[e], x_D))
    weights_K, ids_K = fp32_at(weights_at, 1, slots)[0], int64_at(ids_at, 1, slots)[0]
    taken_E = np.zeros(experts, np.bool_)
    most = np.float32(-np.inf)
    for e in range(experts):
        most = max(most, widen(logits_E[e]))
    total = np.float32(0)
    for e in range(experts):
        total += np.exp(widen(logits_E[e]) - most)
    kept = np.float32(0)
    for k in range(slots):
        best = -1
        for e in range(experts):
            if not taken_E[e] and (best < 0 or widen(logits_E[e]) > widen(logits_E[best])):
                best = e
        taken_E[best] = True
        ids_K[k] = best
        weights_K[k] = np.exp(widen(logits_E[best]) - most) / total
        kept += weights_K[k]
    if normalise:
        for k in range(slots):
            weights_K[k] /= kept
