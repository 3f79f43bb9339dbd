"""Where the experts of one layer run, and how long that takes: device, host and link as three timelines.

Experts come in the event's order: most tokens first. A resident expert can start at once; a missing one is moved first,
one after another, or runs on the host where its weights lie.
"""

from __future__ import annotations

import numpy as np

from moesaic.trace import hardware as H
from moesaic.trace.policies import state as S
from moesaic.trace.policies.loops import compiled, inlined

MOST = 10
"""Misses up to which the makespan rule looks at all 2**MOST assignments."""


@inlined
def t_move(hw, size):
    return hw[H.LINK_WAIT] + size / hw[H.LINK_BW]


@inlined
def t_gpu(hw, n, size):
    if n == 0:
        return 0.0
    return hw[H.DEVICE_WAIT] + max(size / hw[H.DEVICE_BW], n * 2.0 * size / hw[H.WIDTH] / hw[H.DEVICE_FLOPS])


@inlined
def t_cpu(hw, n, size):
    if hw[H.HOST_FLOPS] == 0.0 or hw[H.HOST_BW] == 0.0:
        return np.inf
    return hw[H.HOST_WAIT] + max(size / hw[H.HOST_BW], n * 2.0 * size / hw[H.WIDTH] / hw[H.HOST_FLOPS])


@inlined
def timelines(c, hw, l, n, late):
    """Seconds until the layer's last expert is done, and those that the link is busy.

    `late`: bytes still to come of an expert that was on its way when it was needed.
    """
    gpu = 0.0
    cpu = 0.0
    missing = 0
    for i in range(n):
        size = c.cell[S.SIZE, l, c.event[S.IDS, i]]
        if c.event[S.ON_HOST, i]:
            cpu += t_cpu(hw, c.event[S.TOKENS, i], size)
        elif c.event[S.ACT, i] == S.HIT:
            gpu += t_gpu(hw, c.event[S.TOKENS, i], size)
        else:
            missing += 1
    link = 0.0
    if missing:
        for turn in range(2):  # what is already on its way arrives first
            for i in range(n):
                act = c.event[S.ACT, i]
                if c.event[S.ON_HOST, i] or act == S.HIT or (act == S.LATE) != (turn == 0):
                    continue
                size = c.cell[S.SIZE, l, c.event[S.IDS, i]]
                link += late / hw[H.LINK_BW] if act == S.LATE else t_move(hw, size)
                gpu = max(gpu, link) + t_gpu(hw, c.event[S.TOKENS, i], size)
    return max(gpu, cpu), link


@compiled
def two_ended(hw, size, tokens_n, cached_n, n, order_n, host_n):
    """HybriMoE's greedy: the device takes from the front (cached first, then most tokens), the host from the back.

    Each expert goes to the side that would finish it earlier; the result is the better of that, all on the host, and all on
    the device with copies on demand. Fills host_n with 0 or 1 and returns the makespan.
    """
    filled = 0
    for turn in range(2):
        for i in range(n):
            if (cached_n[i] != 0) == (turn == 0):
                order_n[filled] = i
                filled += 1
    gpu = 0.0
    cpu = 0.0
    moved = 0.0
    front, back = 0, n - 1
    while front <= back:
        i, j = order_n[front], order_n[back]
        arrives = moved if cached_n[i] else moved + t_move(hw, size)
        start = gpu if cached_n[i] else max(gpu, arrives)
        on_gpu = start + t_gpu(hw, tokens_n[i], size)
        on_cpu = cpu + t_cpu(hw, tokens_n[j], size)
        if on_gpu <= on_cpu:
            gpu, moved = on_gpu, arrives
            host_n[i] = 0
            front += 1
        else:
            cpu = on_cpu
            host_n[j] = 1
            back -= 1
    greedy = max(gpu, cpu)
    all_cpu = 0.0
    all_gpu = 0.0
    moved = 0.0
    for at in range(n):
        i = order_n[at]
        all_cpu += t_cpu(hw, tokens_n[i], size)
        if not cached_n[i]:
            moved += t_move(hw, size)
            all_gpu = max(all_gpu, moved)
        all_gpu += t_gpu(hw, tokens_n[i], size)
    best = min(greedy, all_cpu, all_gpu)
    if best < greedy:
        for i in range(n):
            host_n[i] = int(all_cpu < all_gpu)
    return best


@compiled
def _miss_costs(c, hw, l, i):
    """Fiddler's costs of one miss: on the host, and copied to the device and computed there."""
    n, size = c.event[S.TOKENS, i], c.cell[S.SIZE, l, c.event[S.IDS, i]]
    if c.note[S.MEASURED]:
        return t_cpu(hw, n, size), t_move(hw, size) + t_gpu(hw, n, size)
    return n * c.number[S.CPU_COST], c.number[S.GPU_COST]


@compiled
def _shortest(c, hw, l, n):
    """Choose host or copy for every miss so that the longer of both sums is least, never longer than the cheapest-each."""
    count = 0
    for i in range(n):
        if c.event[S.ACT, i] != S.HIT:
            c.event[S.RANK, count] = i
            count += 1
    best = np.inf
    chosen = 0
    if count <= MOST:
        for mask in range(1 << count):
            cpu = 0.0
            gpu = 0.0
            for j in range(count):
                on_cpu, on_gpu = _miss_costs(c, hw, l, c.event[S.RANK, j])
                if mask >> j & 1:
                    cpu += on_cpu
                else:
                    gpu += on_gpu
            if max(cpu, gpu) < best:
                best, chosen = max(cpu, gpu), mask
        for j in range(count):
            c.event[S.ON_HOST, c.event[S.RANK, j]] = chosen >> j & 1
        return
    cpu = 0.0
    gpu = 0.0
    for j in range(count):
        i = c.event[S.RANK, j]
        on_cpu, on_gpu = _miss_costs(c, hw, l, i)
        c.event[S.ON_HOST, i] = int(on_cpu < on_gpu)
        if on_cpu < on_gpu:
            cpu += on_cpu
        else:
            gpu += on_gpu
    for j in range(count):  # one sweep of moves that shorten the longer side
        i = c.event[S.RANK, count - 1 - j]
        on_cpu, on_gpu = _miss_costs(c, hw, l, i)
        if c.event[S.ON_HOST, i] and max(cpu - on_cpu, gpu + on_gpu) < max(cpu, gpu):
            cpu, gpu = cpu - on_cpu, gpu + on_gpu
            c.event[S.ON_HOST, i] = 0
        elif not c.event[S.ON_HOST, i] and max(cpu + on_cpu, gpu - on_gpu) < max(cpu, gpu):
            cpu, gpu = cpu + on_cpu, gpu - on_gpu
            c.event[S.ON_HOST, i] = 1


@inlined
def choose_where(c, hw, l, n, tokens):
    """Mark in event[ON_HOST] what runs on the host, by the policy's rule. Without a host, nothing does."""
    where = c.note[S.WHERE]
    if where == S.MOVE or hw[H.HOST_FLOPS] == 0.0 or hw[H.HOST_BW] == 0.0:
        return
    if where == S.ON_CPU:
        if tokens < c.note[S.HOST_TOKENS]:
            for i in range(n):
                c.event[S.ON_HOST, i] = int(c.event[S.ACT, i] != S.HIT)
    elif where == S.CHEAPEST:
        for i in range(n):
            if c.event[S.ACT, i] != S.HIT:
                on_cpu, on_gpu = _miss_costs(c, hw, l, i)
                c.event[S.ON_HOST, i] = int(on_cpu < on_gpu)
    elif where == S.MAKESPAN:
        _shortest(c, hw, l, n)
    elif tokens < c.note[S.HOST_TOKENS]:
        for i in range(n):
            c.event[S.NEXT, i] = int(c.event[S.ACT, i] != S.LOAD)
        two_ended(hw, c.layer[S.BYTES, l], c.event[S.TOKENS], c.event[S.NEXT], n, c.event[S.RANK], c.event[S.ON_HOST])
