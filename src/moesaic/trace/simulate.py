"""The replay's inner loop: passes of a trace through a policy's own compiled functions, with bytes and seconds counted."""

from __future__ import annotations

import numpy as np

from moesaic.trace import hardware as H
from moesaic.trace.order import EMPTY, NEVER
from moesaic.trace.policies import state as S
from moesaic.trace.policies.allocation import highest_averages
from moesaic.trace.policies.cache import arrived, reserve, resize
from moesaic.trace.policies.engine import begin_step, decide, next_fetch, plan, skip_layer
from moesaic.trace.policies.loops import compiled, inlined
from moesaic.trace.policies.schedule import t_gpu, timelines

(ACCESSES, HITS, FIRST_HITS, WARM, LOADS, STREAMS, HOSTS, LATES, EVICTIONS, DEMANDED, FETCHED, CHOICES, COUNTS) = range(13)
"""Rows of `count_CL`, per layer. DEMANDED and FETCHED are bytes; WARM are first touches that found a free slot."""
SECONDS, STALL, LINK, DECODE, DECODE_STALL, TIMES = range(6)
"""Entries of `time`, in seconds."""
PASSES, TOKENS, DECODE_TOKENS, FLIGHT_L, FLIGHT_E, FLIGHT_LEFT, MARKS = range(7)
"""Entries of `mark`. FLIGHT_LEFT: bytes that the expert on its way still misses."""
FAR = 1 << 60


@compiled
def rank(c, row, n, values):
    """Sort the first n of event[row] by event[values], most first, ties as they were."""
    for i in range(1, n):
        e, count, after = c.event[row, i], c.event[values, i], c.event[S.NEXT, i]
        j = i - 1
        while j >= 0 and c.event[values, j] < count:
            c.event[row, j + 1], c.event[values, j + 1] = c.event[row, j], c.event[values, j]
            c.event[S.NEXT, j + 1] = c.event[S.NEXT, j]
            j -= 1
        c.event[row, j + 1], c.event[values, j + 1], c.event[S.NEXT, j + 1] = e, count, after


@inlined
def by_votes(c, row, n, tokens):
    """Turn the votes of the experts in event[row] into token counts; of several tokens, most wanted experts first."""
    for i in range(n):
        e = c.event[row, i]
        c.event[S.TOKENS, i] = c.event[S.VOTES, e]
        c.event[S.VOTES, e] = 0
    if tokens > 1:
        rank(c, row, n, S.TOKENS)


@inlined
def gather(c, l, ids_TLK, next_TLK, first, last):
    """Lay the event of one layer out in c.event: distinct experts, most tokens first, ties by first appearance."""
    n = 0
    filled = 0
    layers = ids_TLK.shape[1]
    known = next_TLK.shape[0] > 0
    horizon = c.note[S.HORIZON]
    for t in range(first, last):
        for k in range(ids_TLK.shape[2]):
            e = int(ids_TLK[t, l, k])
            if e == EMPTY:
                continue
            filled += 1
            if c.event[S.VOTES, e] == 0:
                c.event[S.IDS, n] = e
                if known:
                    after = int(next_TLK[t, l, k])
                    blind = after == NEVER or (horizon > 0 and after - (c.note[S.STEP] - 1) > horizon)
                    c.event[S.NEXT, n] = FAR if blind else after * layers + l
                n += 1
            c.event[S.VOTES, e] += 1
    by_votes(c, S.IDS, n, last - first)
    if c.note[S.DENSE]:  # whoever moves a whole layer moves what nobody chose, too
        for i in range(n):
            c.event[S.VOTES, c.event[S.IDS, i]] = 1
        for e in range(c.layer[S.EXPERTS, l]):
            if c.event[S.VOTES, e] == 0:
                c.event[S.IDS, n], c.event[S.TOKENS, n] = e, 0
                n += 1
            c.event[S.VOTES, e] = 0
    return n, filled


@compiled
def want(c, target, ids_TM, first, last, width):
    """Lay out what the rows of a look-ahead want of a layer: experts by tokens that want them, then by rank."""
    n = 0
    for j in range(min(width, ids_TM.shape[1])):
        for t in range(first, last):
            e = int(ids_TM[t, j])
            if e == EMPTY:
                continue
            if c.event[S.VOTES, e] == 0:
                c.event[S.RANK, n] = e
                n += 1
            c.event[S.VOTES, e] += 1
    by_votes(c, S.RANK, n, last - first)
    for i in range(n):
        c.cell[S.WANT, target, i] = c.event[S.RANK, i]
        c.cell[S.VOTED, target, i] = c.event[S.TOKENS, i]
    c.layer[S.WANTED, target] = n


@compiled
def look_ahead(c, l, ids_TLK, ahead_TLAM, guess_TLM, starts_N1, s):
    """Lay out what is believed, at layer l of pass s, of the layers to come."""
    source = c.note[S.SOURCE]
    layers = ids_TLK.shape[1]
    first, last = starts_N1[s], starts_N1[s + 1]
    width = c.note[S.WIDTH]
    if source == S.PREDICTED:
        if l < 0:
            for target in range(layers):
                want(c, target, guess_TLM[:, target], first, last, width)
    elif source == S.TRUTH:
        for d in range(1, c.note[S.DEPTH] + 1):
            target = l + d
            if target < layers:
                want(c, target, ids_TLK[:, target], first, last, ids_TLK.shape[2])
            elif c.note[S.WRAP] and s + 2 < len(starts_N1) and target - layers < layers:
                want(c, target - layers, ids_TLK[:, target - layers], starts_N1[s + 1], starts_N1[s + 2], ids_TLK.shape[2])
    elif (source == S.AHEAD or source == S.IMPACT) and l >= 0:
        for d in range(1, min(c.note[S.DEPTH], ahead_TLAM.shape[2]) + 1):
            if l + d < layers:
                want(c, l + d, ahead_TLAM[:, l, d - 1], first, last, width)


@compiled
def mean_scores(c, l, logits_TLE, first, last):
    """Mean over the pass's tokens of the softmax (or, where so set, normalised sigmoid) of a layer's logits."""
    experts = c.layer[S.EXPERTS, l]
    for e in range(experts):
        c.score[0, e] = 0.0
    for t in range(first, last):
        total = 0.0
        top = -np.inf
        for e in range(experts):
            top = max(top, logits_TLE[t, l, e])
        for e in range(experts):
            x = logits_TLE[t, l, e]
            v = 1.0 / (1.0 + np.exp(-x)) if c.note[S.SIGMOID] else np.exp(x - top)
            c.score[1, e] = v
            total += v
        for e in range(experts):
            c.score[0, e] += c.score[1, e] / (total * (last - first))


@compiled
def fetch_ahead(c, m, hw, seconds, count_CL, mark):
    """Let prefetch use the link for as long as it idles."""
    budget = seconds * hw[H.LINK_BW]
    while budget >= 1.0:
        l, e = mark[FLIGHT_L], mark[FLIGHT_E]
        if mark[FLIGHT_LEFT] > 0:
            moved = min(mark[FLIGHT_LEFT], int(budget))
            mark[FLIGHT_LEFT] -= moved
            budget -= moved
            count_CL[FETCHED, l] += moved
            if mark[FLIGHT_LEFT] == 0:
                arrived(c, l, e)
            continue
        l, e = next_fetch(c, m, hw)
        if e < 0:
            return
        gone = c.note[S.GONE]
        if not reserve(c, l, e):
            skip_layer(c)
            continue
        count_CL[EVICTIONS, l] += c.note[S.GONE] - gone
        mark[FLIGHT_L], mark[FLIGHT_E], mark[FLIGHT_LEFT] = l, e, c.cell[S.SIZE, l, e]
        budget -= hw[H.LINK_WAIT] * hw[H.LINK_BW]


@inlined
def land(c, l, count_CL, mark):
    """What is on its way is either needed now (its bytes still to come are returned), or was turned back, or flies on."""
    if mark[FLIGHT_LEFT] == 0:
        return 0
    fl, fe = mark[FLIGHT_L], mark[FLIGHT_E]
    left = mark[FLIGHT_LEFT]
    if fl == l and c.cell[S.USED_AT, fl, fe] == c.note[S.SERIAL]:
        mark[FLIGHT_LEFT] = 0
        count_CL[DEMANDED, l] += left
        c.note[S.SPENT] -= left
        return left
    if not c.cell[S.GUESS, fl, fe]:
        c.note[S.WASTED] += c.cell[S.SIZE, fl, fe] - left
        mark[FLIGHT_LEFT] = 0
    return 0


@inlined
def book(c, l, n, filled, free, count_CL):
    """Count what became of an event's experts. `free`: bytes that were unused before it."""
    count_CL[ACCESSES, l] += n
    count_CL[CHOICES, l] += filled
    count_CL[EVICTIONS, l] += c.note[S.GONE]
    for i in range(n):
        e = c.event[S.IDS, i]
        act = c.event[S.ACT, i]
        new = not c.cell[S.SEEN, l, e]
        c.cell[S.SEEN, l, e] = 1
        if act == S.HIT:
            count_CL[HITS, l] += 1
            count_CL[FIRST_HITS, l] += int(new)
            continue
        size = c.cell[S.SIZE, l, e]
        if new and free >= size and c.note[S.ADMIT]:
            count_CL[WARM, l] += 1
            free -= size
        if c.event[S.ON_HOST, i]:
            count_CL[HOSTS, l] += 1
        elif act == S.LATE:
            count_CL[LATES, l] += 1
        else:
            count_CL[LOADS if act == S.LOAD else STREAMS, l] += 1
            count_CL[DEMANDED, l] += size


@compiled
def drive(
    c, m, hw, ids_TLK, starts_N1, fresh_N, steps, next_TLK, logits_TLE, ahead_TLAM, guess_TLM, demand_WL, count_CL, time, mark
):
    """Run `steps` passes of a block. Arrays that the policy does not read are empty."""
    layers = ids_TLK.shape[1]
    guesses = c.note[S.SOURCE] != S.NOTHING
    for s in range(steps):
        first, last = starts_N1[s], starts_N1[s + 1]
        tokens = last - first
        begin_step(c, m, fresh_N[s], tokens > 1)
        before, stalled = time[SECONDS], time[STALL]
        if c.note[S.WINDOW] and (c.note[S.STEP] - 1) % c.note[S.WINDOW] == 0:
            resize(
                c,
                highest_averages(
                    c.note[S.AT_MOST], c.layer[S.EXPERTS], c.layer[S.BYTES], demand_WL[(c.note[S.STEP] - 1) // c.note[S.WINDOW]]
                ),
            )
        idle = 0.0
        for l in range(-1, layers):
            if l < 0:
                if c.note[S.SOURCE] == S.PREDICTED:
                    look_ahead(c, l, ids_TLK, ahead_TLAM, guess_TLM, starts_N1, s)
                    plan(c, m, l, l + 1, tokens)
                continue
            dense = hw[H.DEVICE_WAIT] + max(
                hw[H.DENSE] / hw[H.DEVICE_BW], tokens * 2.0 * hw[H.DENSE] / hw[H.WIDTH] / hw[H.DEVICE_FLOPS]
            )
            time[SECONDS] += dense
            if guesses:
                fetch_ahead(c, m, hw, idle + dense, count_CL, mark)
            n, filled = gather(c, l, ids_TLK, next_TLK, first, last)
            if logits_TLE.shape[0]:
                mean_scores(c, l, logits_TLE, first, last)
            free = c.group[S.ROOM, c.layer[S.GROUP, l]]
            decide(c, m, hw, l, n, tokens)
            late = land(c, l, count_CL, mark) if guesses else 0
            took, link = timelines(c, hw, l, n, late)
            least = 0.0
            for i in range(n):
                least += t_gpu(hw, c.event[S.TOKENS, i], c.cell[S.SIZE, l, c.event[S.IDS, i]])
            time[SECONDS] += took
            time[STALL] += max(0.0, took - least)
            time[LINK] += link
            book(c, l, n, filled, free, count_CL)
            if guesses:
                idle = max(0.0, took - link)
                look_ahead(c, l, ids_TLK, ahead_TLAM, guess_TLM, starts_N1, s)
                plan(c, m, l, n, tokens)
        if guesses and idle > 0.0:
            fetch_ahead(c, m, hw, idle, count_CL, mark)
        mark[PASSES] += 1
        mark[TOKENS] += tokens
        if tokens == 1:
            mark[DECODE_TOKENS] += 1
            time[DECODE] += time[SECONDS] - before
            time[DECODE_STALL] += time[STALL] - stalled
