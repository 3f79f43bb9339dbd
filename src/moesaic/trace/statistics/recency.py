"""Experts in order of last use: where each choice is found (Mattson's stack), and how long it was away."""

from __future__ import annotations

import numpy as np

from moesaic.core.compiled import compiled


@compiled
def stack(experts_tLK, experts_L, starts_s1, own_sL, unit_s, sizes_LC, again_LE, first_LE, hits_ULC, uses_UL):
    """Add a block's choices to the counts of places at which they were found; every sequence starts with an empty stack.

    The experts of one token are looked up together, then moved to the top, the first slot last, so that it stays longest: as
    the replay of an LRU policy does, to the count. A choice found at place d is a hit
    in every LRU cache of more than d experts, as long as that holds at least one token's choices.

    Args:
        experts_tLK: ids (int32), -1 = empty slot, none twice in a row of one layer.
        experts_L, starts_s1, own_sL, unit_s: as for `slide`. sizes_LC: cache sizes, for `hits_ULC`.
        again_LE: place of every repeated choice. first_LE: first uses in a sequence, at the place of the first free slot.
        hits_ULC: repeated choices below each size, by unit. uses_UL: choices by unit.
    """
    layers, slots = experts_tLK.shape[1], experts_tLK.shape[2]
    order = np.zeros(again_LE.shape[1] + 1, np.int64)
    place_E = np.zeros(again_LE.shape[1], np.int64)
    for s in range(len(unit_s)):
        unit = unit_s[s]
        for l in range(layers):
            if not own_sL[s, l]:
                continue
            place_E[:] = -1
            seen = 0
            for t in range(starts_s1[s], starts_s1[s + 1]):
                held = seen
                for k in range(slots):
                    e = experts_tLK[t, l, k]
                    if e < 0:
                        continue
                    uses_UL[unit, l] += 1
                    place = place_E[e]
                    if place < 0:
                        first_LE[l, seen] += 1
                        seen += 1
                    else:
                        again_LE[l, place] += 1
                        for c in range(sizes_LC.shape[1]):
                            if place < sizes_LC[l, c]:
                                hits_ULC[unit, l, c] += 1
                for k in range(slots - 1, -1, -1):
                    e = experts_tLK[t, l, k]
                    if e < 0:
                        continue
                    place = place_E[e]
                    if place < 0:
                        place = held
                        held += 1
                    for i in range(place, 0, -1):
                        order[i] = order[i - 1]
                        place_E[order[i]] = i
                    order[0] = e
                    place_E[e] = 0


@compiled
def absences(experts_tLK, experts_L, starts_s1, own_sL, gaps_LG, lengths_LG, back_LG):
    """Add a block's absences to a histogram of their length in tokens: runs of tokens that do not choose an expert.

    Args:
        gaps_LG: by length, also of experts that a sequence never chooses (its whole length). lengths_LG: lengths of the
            sequences. back_LG: of the absences between two uses alone. G exceeds the longest sequence.
    """
    layers, slots = experts_tLK.shape[1], experts_tLK.shape[2]
    most = 0
    for l in range(layers):
        most = max(most, experts_L[l])
    last_E = np.zeros(most, np.int64)
    for s in range(len(starts_s1) - 1):
        first, stop = starts_s1[s], starts_s1[s + 1]
        for l in range(layers):
            if not own_sL[s, l]:
                continue
            lengths_LG[l, stop - first] += 1
            last_E[:] = first - 1
            for t in range(first, stop):
                for k in range(slots):
                    e = experts_tLK[t, l, k]
                    if e >= 0:
                        gaps_LG[l, t - last_E[e] - 1] += 1
                        if last_E[e] >= first:
                            back_LG[l, t - last_E[e] - 1] += 1
                        last_E[e] = t
            for e in range(experts_L[l]):
                gaps_LG[l, stop - last_E[e] - 1] += 1
