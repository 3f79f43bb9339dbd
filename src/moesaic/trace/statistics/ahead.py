"""A cache that evicts what the next m tokens use least: the simulation behind SCH."""

from __future__ import annotations

import numpy as np

from moesaic.core.compiled import compiled


@compiled
def simulate(experts_tLK, experts_L, starts_s1, own_sL, unit_s, window, sizes_LC, hits_ULC, strict_LC, uses_UL):
    """Add the hits of a block of choices; every sequence starts with an empty cache.

    The experts of one token are looked up together, then taken in one by one in slot order. On a miss when full, out goes
    the expert with the fewest activations among the m tokens from this one on, less those of it already served; of equals,
    the one used longest ago.

    Args:
        experts_tLK: ids (int32), -1 = empty slot, none twice in a row of one layer.
        experts_L, starts_s1, own_sL, unit_s: as for `slide`. window: m. sizes_LC: experts that each cache holds.
        hits_ULC: found ones, and first uses in the sequence while a slot is free. strict_LC: found ones alone.
        uses_UL: choices.

    Held experts are in lists by how often they are still to be used. An expert enters list 0 only by being used, so that
    list stays in order of use and its head goes first; the other lists are searched, which happens only when 0 is empty.
    """
    layers, slots, sizes = experts_tLK.shape[1], experts_tLK.shape[2], sizes_LC.shape[1]
    most = 0
    for l in range(layers):
        most = max(most, experts_L[l])
    coming_E, used_E = np.zeros(most, np.int32), np.zeros(most, np.int64)
    held_E = np.zeros(most, np.bool_)
    next_E, previous_E = np.zeros(most, np.int32), np.zeros(most, np.int32)
    head, tail = np.zeros(window + 1, np.int32), np.zeros(window + 1, np.int32)
    for s in range(len(unit_s)):
        first, stop, unit = starts_s1[s], starts_s1[s + 1], unit_s[s]
        for l in range(layers):
            if not own_sL[s, l]:
                continue
            for t in range(first, stop):
                for k in range(slots):
                    if experts_tLK[t, l, k] >= 0:
                        uses_UL[unit, l] += 1
            for c in range(sizes):
                size = sizes_LC[l, c]
                coming_E[:] = 0
                used_E[:] = 0
                held_E[:] = False
                head[:] = -1
                held, clock, lowest = 0, 0, window
                for t in range(first, min(first + window, stop)):
                    for k in range(slots):
                        if experts_tLK[t, l, k] >= 0:
                            coming_E[experts_tLK[t, l, k]] += 1
                for t in range(first, stop):
                    free = size - held
                    for k in range(slots):
                        e = experts_tLK[t, l, k]
                        if e >= 0:
                            if held_E[e]:
                                hits_ULC[unit, l, c] += 1
                                strict_LC[l, c] += 1
                            elif used_E[e] == 0 and free > 0:
                                hits_ULC[unit, l, c] += 1
                                free -= 1
                    for k in range(slots):
                        e = experts_tLK[t, l, k]
                        if e < 0:
                            continue
                        if held_E[e]:
                            _leave(e, coming_E[e], head, tail, next_E, previous_E)
                        else:
                            if held == size:
                                while head[lowest] < 0:
                                    lowest += 1
                                out = head[lowest]
                                if lowest > 0:
                                    other = next_E[out]
                                    while other >= 0:
                                        if used_E[other] < used_E[out]:
                                            out = other
                                        other = next_E[other]
                                _leave(out, lowest, head, tail, next_E, previous_E)
                                held_E[out] = False
                            else:
                                held += 1
                            held_E[e] = True
                        clock += 1
                        used_E[e] = clock
                        coming_E[e] -= 1
                        _enter(e, coming_E[e], head, tail, next_E, previous_E)
                        lowest = min(lowest, coming_E[e])
                    if t + window < stop:
                        for k in range(slots):
                            e = experts_tLK[t + window, l, k]
                            if e >= 0:
                                if held_E[e]:
                                    _leave(e, coming_E[e], head, tail, next_E, previous_E)
                                    _enter(e, coming_E[e] + 1, head, tail, next_E, previous_E)
                                coming_E[e] += 1


@compiled
def _leave(e, where, head, tail, next_E, previous_E):
    before, after = previous_E[e], next_E[e]
    if before >= 0:
        next_E[before] = after
    else:
        head[where] = after
    if after >= 0:
        previous_E[after] = before
    else:
        tail[where] = before


@compiled
def _enter(e, where, head, tail, next_E, previous_E):
    next_E[e] = -1
    if head[where] < 0:
        head[where] = e
        previous_E[e] = -1
    else:
        next_E[tail[where]] = e
        previous_E[e] = tail[where]
    tail[where] = e
