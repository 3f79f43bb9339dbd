"""What policies know from earlier routing: requests to match the running one with, paths to the next layer, top scores.

MoE-Infinity's library, EdgeMoE's dictionary and HybriMoE's smoothed scores, as compiled code over `Memory` and `State`.
"""

from __future__ import annotations

import numpy as np

from moesaic.trace.policies import state as S
from moesaic.trace.policies.loops import compiled

EPSILON = 1e-6
MASK = (1 << 31) - 1


@compiled
def mix(e):
    """Spread an id over 31 bits; products stay below 2**62, so that NumPy and compiled code agree."""
    x = ((e + 1) * 1103515245 + 12345) & MASK
    x = ((x ^ (x >> 13)) * 1597334677) & MASK
    return x ^ (x >> 11)


@compiled
def path_key(before, now, layer):
    """Key of a dictionary entry: the sets of experts of the two last layers, each a sum of mixed ids, and the layer."""
    return ((before & MASK) * 2147483629 + (now & MASK) * 40503 + layer * 7919) & ((1 << 62) - 1)


@compiled
def store_request(m, phase, request_LE):
    """Add a request's counts to the library; a full one gives up the entry most like it (least cosine distance)."""
    size = m.library_PLEN.shape[3]
    total = 0.0
    for l in range(request_LE.shape[0]):
        for e in range(request_LE.shape[1]):
            total += request_LE[l, e]
    if size == 0 or total == 0:
        return
    at = m.filled_P[phase]
    if at < size:
        m.filled_P[phase] = at + 1
    else:
        best = -1.0
        at = 0
        for j in range(size):
            dot = 0.0
            for l in range(request_LE.shape[0]):
                for e in range(request_LE.shape[1]):
                    dot += request_LE[l, e] * m.library_PLEN[phase, l, e, j]
            likeness = dot * np.sqrt(m.norms_PLN[phase, request_LE.shape[0], j])
            if likeness > best:
                best, at = likeness, j
    total = 0.0
    for l in range(request_LE.shape[0]):
        for e in range(request_LE.shape[1]):
            m.library_PLEN[phase, l, e, at] = request_LE[l, e]
            total += request_LE[l, e] * request_LE[l, e]
        m.norms_PLN[phase, l + 1, at] = 1.0 / total if total > 0 else 0.0


@compiled
def begin_request(c, m, phase):
    """Store the request that ends, and start counting anew; prefill and decoding are told apart."""
    store_request(m, c.note[S.PHASE], c.real[S.REQUEST])
    for l in range(c.layer.shape[1]):
        for e in range(c.layer[S.EXPERTS, l]):
            c.real[S.REQUEST, l, e] = 0.0
    for j in range(len(m.dots_N)):
        m.dots_N[j] = 0.0
    c.note[S.PHASE] = phase
    c.note[S.ROWS] = 0
    c.note[S.BEST] = -1


@compiled
def believe(c, m, best):
    """Take over what a stored request says that every layer uses, as row-normalised worths."""
    phase = c.note[S.PHASE]
    c.note[S.BEST] = best
    for l in range(c.layer.shape[1]):
        total = 0.0
        for e in range(c.layer[S.EXPERTS, l]):
            total += m.library_PLEN[phase, l, e, best]
        for e in range(c.layer[S.EXPERTS, l]):
            share = m.library_PLEN[phase, l, e, best] / total if total > 0 else 0.0
            c.real[S.KEEP, l, e] = share + EPSILON
        c.layer[S.STALE, l] = 1


@compiled
def observe_request(c, m, l, n):
    """Count an event, find the stored request nearest to what was seen so far, and believe it."""
    phase = c.note[S.PHASE]
    stored = m.filled_P[phase]
    for i in range(n):
        e, count = c.event[S.IDS, i], c.event[S.TOKENS, i]
        c.real[S.REQUEST, l, e] += count
        for j in range(stored):
            m.dots_N[j] += count * m.library_PLEN[phase, l, e, j]
    if l + 1 > c.note[S.ROWS]:
        c.note[S.ROWS] = l + 1
    if stored == 0:  # nothing to match yet: the request's own counts
        total = 0.0
        for e in range(c.layer[S.EXPERTS, l]):
            total += c.real[S.REQUEST, l, e]
        for e in range(c.layer[S.EXPERTS, l]):
            c.real[S.KEEP, l, e] = c.real[S.REQUEST, l, e] / total + EPSILON
        c.layer[S.STALE, l] = 1
        return
    best = -1
    likeness = -1.0
    for j in range(stored):
        value = m.dots_N[j] * m.dots_N[j] * m.norms_PLN[phase, c.note[S.ROWS], j]
        if value > likeness:
            best, likeness = j, value
    if best != c.note[S.BEST]:
        believe(c, m, best)


@compiled
def smooth_scores(c, l):
    """HybriMoE's MRS: keep the TOP largest of score, mix them into the layer's worths with weight ALPHA."""
    experts = c.layer[S.EXPERTS, l]
    top = min(int(c.number[S.TOP]), experts)
    held = 0
    for e in range(experts):  # event[RANK] holds the best so far, in order
        value = c.score[0, e]
        if held == top and value <= c.score[0, c.event[S.RANK, top - 1]]:
            continue
        at = held if held < top else top - 1
        while at > 0 and c.score[0, c.event[S.RANK, at - 1]] < value:
            c.event[S.RANK, at] = c.event[S.RANK, at - 1]
            at -= 1
        c.event[S.RANK, at] = e
        if held < top:
            held += 1
    alpha = c.number[S.ALPHA]
    for e in range(experts):
        c.real[S.KEEP, l, e] *= 1.0 - alpha
    for at in range(held):
        e = c.event[S.RANK, at]
        c.real[S.KEEP, l, e] += alpha * c.score[0, e]
    c.layer[S.STALE, l] = 1


@compiled
def follow_path(c, m, l, n, single):
    """Lay out what the dictionary expects of layer l + 1, best first; for an unseen path the layer's usual experts."""
    now = 0
    for i in range(n):
        now += mix(c.event[S.IDS, i])
    before = c.note[S.PREVIOUS] if l > 0 else 0
    c.note[S.PREVIOUS] = now
    if l + 1 >= c.layer.shape[1]:
        return
    found = -1
    if single:
        key = path_key(before, now, l + 1)
        low, high = 0, len(m.keys_P)
        while low < high:
            mid = (low + high) // 2
            if m.keys_P[mid] < key:
                low = mid + 1
            else:
                high = mid
        if low < len(m.keys_P) and m.keys_P[low] == key:
            found = low
    row = m.next_PM[found] if found >= 0 else m.usual_LM[l + 1]
    count = 0
    for i in range(len(row)):
        if row[i] >= 0 and count < c.note[S.WIDTH]:
            c.cell[S.WANT, l + 1, count] = row[i]
            c.cell[S.VOTED, l + 1, count] = 1
            count += 1
    c.layer[S.WANTED, l + 1] = count
