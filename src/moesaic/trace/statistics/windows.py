"""How often each expert is active in every window of m tokens: histograms that slide along without visiting E experts."""

from __future__ import annotations

import numpy as np

from moesaic.core.compiled import compiled


@compiled
def slide(experts_tLK, experts_L, starts_s1, own_sL, unit_s, window, by_unit_ULF, by_expert_LEF):
    """Add a block's windows to two histograms of f, the tokens of a window that chose an expert, 0 to m.

    Args:
        experts_tLK: ids (int32), -1 = empty slot, none twice in a row of one layer.
        experts_L: experts of each layer.
        starts_s1, own_sL, unit_s: of the block's sequences; windows lie inside one.
        by_unit_ULF: per unit and layer, over all experts (those never chosen too). by_expert_LEF: per expert.

    Moving on by a token changes f of at most 2K experts; how long each kept its value is added when it changes.
    """
    layers, slots = experts_tLK.shape[1], experts_tLK.shape[2]
    experts = by_expert_LEF.shape[1]
    f_E = np.zeros(experts, np.int64)
    since_E = np.zeros(experts, np.int64)
    for s in range(len(unit_s)):
        first, stop = starts_s1[s], starts_s1[s + 1]
        windows = stop - first - window + 1
        if windows <= 0:
            continue
        for l in range(layers):
            if not own_sL[s, l]:
                continue
            f_E[:] = 0
            since_E[:] = 0
            unit = by_unit_ULF[unit_s[s], l]
            own = by_expert_LEF[l]
            for t in range(first, first + window):
                for k in range(slots):
                    e = experts_tLK[t, l, k]
                    if e >= 0:
                        f_E[e] += 1
            for w in range(1, windows):
                for change in (-1, 1):
                    t = first + w - 1 if change < 0 else first + w + window - 1
                    for k in range(slots):
                        e = experts_tLK[t, l, k]
                        if e >= 0:
                            kept = w - since_E[e]
                            if kept > 0:
                                unit[f_E[e]] += kept
                                own[e, f_E[e]] += kept
                                since_E[e] = w
                            f_E[e] += change
            for e in range(experts_L[l]):
                unit[f_E[e]] += windows - since_E[e]
                own[e, f_E[e]] += windows - since_E[e]


@compiled
def favourites(experts_tLK, starts_s1, own_sL, window, sizes_LC, kept_LC, all_L):
    """Add up, over a block's windows, the choices of each window's c most used experts, and all its choices.

    Args:
        sizes_LC: c for every layer. kept_LC, all_L: the sums.

    With N(v) experts at f >= v, the c largest f add up to the sum over v of min(c, N(v)): one step of f changes one N.
    """
    layers, slots = experts_tLK.shape[1], experts_tLK.shape[2]
    sizes = sizes_LC.shape[1]
    most = 0
    for t in range(experts_tLK.shape[0]):
        for l in range(layers):
            for k in range(slots):
                most = max(most, experts_tLK[t, l, k])
    f_E = np.zeros(most + 1, np.int64)
    at_least = np.zeros(window + 2, np.int64)
    kept_C = np.zeros(sizes, np.int64)
    for s in range(len(starts_s1) - 1):
        first, stop = starts_s1[s], starts_s1[s + 1]
        if stop - first < window:
            continue
        for l in range(layers):
            if not own_sL[s, l]:
                continue
            f_E[:] = 0
            at_least[:] = 0
            kept_C[:] = 0
            active = 0
            for t in range(first, stop):
                for k in range(slots):
                    e = experts_tLK[t, l, k]
                    if e >= 0:
                        f_E[e] += 1
                        active += 1
                        at_least[f_E[e]] += 1
                        for c in range(sizes):
                            if at_least[f_E[e]] <= sizes_LC[l, c]:
                                kept_C[c] += 1
                if t - first >= window:
                    for k in range(slots):
                        e = experts_tLK[t - window, l, k]
                        if e >= 0:
                            for c in range(sizes):
                                if at_least[f_E[e]] <= sizes_LC[l, c]:
                                    kept_C[c] -= 1
                            at_least[f_E[e]] -= 1
                            f_E[e] -= 1
                            active -= 1
                if t - first >= window - 1:
                    all_L[l] += active
                    for c in range(sizes):
                        kept_LC[l, c] += kept_C[c]
