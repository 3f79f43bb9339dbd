"""One token's chosen experts, sorted as the passes of a decoding step run them.

Shape legend: K slots, P hit experts. Numba's cache looks at the file of a pass alone: after a change here, touch the passes.
"""

from __future__ import annotations

import numba

from moesaic.kernels.compiled.at import fp32_at, int64_at


@numba.njit(error_model="numpy")
def sorted_choice(ids_at, weights_at, slots, experts, spans_P3, weight_P):
    """Fill spans (expert, pair, pair + 1) and weights by rising expert, from ids [K] int64 and weights [K] fp32 by address.

    Ids outside [0, experts) are empty slots. Returns how many there are; -1 where an expert is chosen twice.
    """
    ids_K, weights_K, hit = int64_at(ids_at, 1, slots)[0], fp32_at(weights_at, 1, slots)[0], 0
    for k in range(slots):
        e, at = ids_K[k], hit
        if e < 0 or e >= experts:
            continue
        while at > 0 and spans_P3[at - 1, 0] > e:
            spans_P3[at, 0], weight_P[at] = spans_P3[at - 1, 0], weight_P[at - 1]
            at -= 1
        if at > 0 and spans_P3[at - 1, 0] == e:
            return -1
        spans_P3[at, 0], weight_P[at] = e, weights_K[k]
        hit += 1
    for p in range(hit):
        spans_P3[p, 1], spans_P3[p, 2] = p, p + 1
    return hit
