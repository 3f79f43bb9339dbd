"""The replay's inner loop: passes of a trace through a policy's own compiled functions, with bytes and seconds counted."""

from __future__ import annotations

from moesaic.core.compiled import compiled
from moesaic.trace import hardware as H
from moesaic.trace.order import EMPTY, NEVER
from moesaic.trace.policies import state as S
from moesaic.trace.policies.engine import begin_step, decide
from moesaic.trace.policies.schedule import t_gpu, timelines

(ACCESSES, HITS, FIRST_HITS, WARM, LOADS, STREAMS, HOSTS, LATES, EVICTIONS, DEMANDED, FETCHED, CHOICES, COUNTS) = range(13)
"""Rows of `count_CL`, per layer. DEMANDED and FETCHED are bytes; WARM are first touches that found a free slot."""
SECONDS, STALL, LINK, DECODE, DECODE_STALL, TIMES = range(6)
"""Entries of `time`, in seconds."""
PASSES, TOKENS, DECODE_TOKENS, FLIGHT_L, FLIGHT_E, FLIGHT_LEFT, PREFILLED, MARKS = range(8)
"""Entries of `mark`."""


@compiled
def gather(c, l, ids_TLK, next_TLK, first, last):
    """Lay the event of one layer out in c.event: distinct experts, most tokens first, ties by first appearance."""
    n = 0
    filled = 0
    layers = ids_TLK.shape[1]
    known = next_TLK.shape[0] > 0
    for t in range(first, last):
        for k in range(ids_TLK.shape[2]):
            e = int(ids_TLK[t, l, k])
            if e == EMPTY:
                continue
            filled += 1
            if c.event[S.VOTES, e] == 0:
                c.event[S.IDS, n] = e
                if known:
                    after = next_TLK[t, l, k]
                    c.event[S.NEXT, n] = after * layers + l if after != NEVER else 1 << 60
                n += 1
            c.event[S.VOTES, e] += 1
    for i in range(n):
        e = c.event[S.IDS, i]
        c.event[S.TOKENS, i] = c.event[S.VOTES, e]
        c.event[S.VOTES, e] = 0
    if last - first > 1:
        for i in range(1, n):
            e, count, after = c.event[S.IDS, i], c.event[S.TOKENS, i], c.event[S.NEXT, i]
            j = i - 1
            while j >= 0 and c.event[S.TOKENS, j] < count:
                c.event[S.IDS, j + 1], c.event[S.TOKENS, j + 1] = c.event[S.IDS, j], c.event[S.TOKENS, j]
                c.event[S.NEXT, j + 1] = c.event[S.NEXT, j]
                j -= 1
            c.event[S.IDS, j + 1], c.event[S.TOKENS, j + 1], c.event[S.NEXT, j + 1] = e, count, after
    return n, filled


@compiled
def book(c, l, n, filled, free, count_CL):
    """Count what became of an event's experts. `free`: bytes that were unused before it."""
    size = c.layer[S.BYTES, l]
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
        if new and free >= size:
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
def drive(c, m, hw, ids_TLK, starts_N1, fresh_N, steps, next_TLK, count_CL, time, mark):
    """Run `steps` passes of a block."""
    layers = ids_TLK.shape[1]
    for s in range(steps):
        first, last = starts_N1[s], starts_N1[s + 1]
        tokens = last - first
        prefill = tokens > 1
        begin_step(c, m, fresh_N[s], prefill)
        before = time[SECONDS]
        stall_before = time[STALL]
        for l in range(layers):
            n, filled = gather(c, l, ids_TLK, next_TLK, first, last)
            free = c.group[S.ROOM, c.layer[S.GROUP, l]]
            time[SECONDS] += hw[H.DEVICE_WAIT] + max(
                hw[H.DENSE] / hw[H.DEVICE_BW], tokens * 2.0 * hw[H.DENSE] / hw[H.WIDTH] / hw[H.DEVICE_FLOPS]
            )
            if n == 0:
                continue
            decide(c, m, hw, l, n, tokens)
            late = 0.0
            took, _, link = timelines(c, hw, l, n, late)
            least = 0.0
            for i in range(n):
                least += t_gpu(hw, c.event[S.TOKENS, i], c.layer[S.BYTES, l])
            time[SECONDS] += took
            time[STALL] += max(0.0, took - least)
            time[LINK] += link
            book(c, l, n, filled, free, count_CL)
        mark[PASSES] += 1
        mark[TOKENS] += tokens
        if not prefill:
            mark[DECODE_TOKENS] += 1
            time[DECODE] += time[SECONDS] - before
            time[DECODE_STALL] += time[STALL] - stall_before
