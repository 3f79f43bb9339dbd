"""Who leaves, who enters, and what becomes of every expert of an event: the compiled core that all policies share.

Every function works on a `State` (argument `c`) in place. `before` is the serial from which on a used expert may not
leave: this event's, so that what is in use is pinned, or for prefetch that of the step's first event. `guarded`: the same
for what is believed to be used soon.
"""

from __future__ import annotations

from moesaic.trace.policies import state as S
from moesaic.trace.policies.arc import arc_admit, arc_hit, arc_victim, move_to
from moesaic.trace.policies.loops import compiled, inlined

DEMAND = 1 << 61
"""Added to what is guarded where the model waits: no guard counts then."""


@inlined
def drop(c, l, e):
    """Take expert e of layer l out of the cache."""
    group = c.layer[S.GROUP, l]
    size = c.cell[S.SIZE, l, e]
    if c.cell[S.RESIDENT, l, e] == S.STAGED or c.cell[S.RESIDENT, l, e] == S.STAGING:
        c.note[S.STAGE_ROOM] += size
    else:
        c.group[S.ROOM, group] += size
        last = c.layer[S.FILLED, l] - 1
        at = c.cell[S.PLACE, l, e]
        moved = c.cell[S.SLOT, l, last]
        c.cell[S.SLOT, l, at] = moved
        c.cell[S.PLACE, l, moved] = at
        c.layer[S.FILLED, l] = last
        if c.note[S.RULE] == S.SEGMENTS and c.cell[S.PART, l, e] == 2:
            c.group[S.PART_BYTES, group] -= size
            c.cell[S.PART, l, e] = 0
        elif c.note[S.RULE] == S.ARC and 1 <= c.cell[S.PART, l, e] <= 2:
            move_to(c, l, e, 0)  # turned back before it came
    c.cell[S.RESIDENT, l, e] = S.ABSENT
    c.layer[S.STALE, l] = 1


@inlined
def put(c, l, e, how):
    """Give expert e of layer l a place that was made free for it."""
    size = c.cell[S.SIZE, l, e]
    c.group[S.ROOM, c.layer[S.GROUP, l]] -= size
    at = c.layer[S.FILLED, l]
    c.cell[S.SLOT, l, at] = e
    c.cell[S.PLACE, l, e] = at
    c.layer[S.FILLED, l] = at + 1
    c.cell[S.RESIDENT, l, e] = how
    c.layer[S.STALE, l] = 1


@inlined
def forget_guess(c, l, e, moved):
    """Book the bytes of a guess that nothing has used."""
    if c.cell[S.GUESS, l, e]:
        c.cell[S.GUESS, l, e] = 0
        c.layer[S.GUESSES, l] -= 1
        c.note[S.WASTED] += moved


@compiled
def evict(c, l, e):
    """Drop, and tell whoever drives the policy."""
    at = c.note[S.GONE]
    if at < len(c.gone):
        c.gone[at, 0] = l
        c.gone[at, 1] = e
    c.note[S.GONE] = at + 1
    forget_guess(c, l, e, c.cell[S.SIZE, l, e])
    drop(c, l, e)


@compiled
def worst_of(c, l, before, guarded):
    """The resident expert of layer l that may leave and is worth least, -1 where none may."""
    worst = -1
    value = 0.0
    stamp = 0
    for at in range(c.layer[S.FILLED, l]):
        e = c.cell[S.SLOT, l, at]
        if c.cell[S.RESIDENT, l, e] != S.HERE or c.cell[S.FIXED, l, e] or c.cell[S.USED_AT, l, e] >= before:
            continue
        if c.cell[S.GUARD, l, e] >= guarded:
            continue
        v = c.real[S.KEEP, l, e]
        t = c.cell[S.STAMPED, l, e]
        if worst < 0 or v < value or (v == value and (t < stamp or (t == stamp and e < worst))):
            worst, value, stamp = e, v, t
    return worst


@compiled
def victim(c, l, before, guarded):
    """Layer and expert that should leave first to make room in layer l's group; (-1, -1) where none may.

    On demand, layers whose contents did not change since the last call need not be looked through again.
    """
    kept = guarded > DEMAND
    if not c.note[S.WHOLE]:
        return l, worst_of(c, l, before, guarded)
    best_l = -1
    best = -1
    value = 0.0
    stamp = 0
    for i in range(c.layer.shape[1]):
        if kept and not c.layer[S.STALE, i]:
            e = c.layer[S.LOW_AT, i]
        else:
            e = worst_of(c, i, before, guarded)
            if kept:
                c.layer[S.LOW_AT, i] = e
                c.layer[S.STALE, i] = 0
        if e < 0:
            continue
        v = c.real[S.KEEP, i, e] * c.factor[S.SCALE, i]
        t = c.cell[S.STAMPED, i, e]
        if best < 0 or v < value or (v == value and t < stamp):
            best_l, best, value, stamp = i, e, v, t
    return best_l, best


@compiled
def make_room(c, l, e, before, guarded):
    """Evict until expert e of layer l fits. False, with what has left gone, where it cannot."""
    group = c.layer[S.GROUP, l]
    size = c.cell[S.SIZE, l, e]
    kept = guarded > DEMAND
    if c.group[S.CAPACITY, group] < size:
        return False
    while c.group[S.ROOM, group] < size:
        if c.note[S.RULE] == S.ARC:
            at = l
            out = arc_victim(c, l, e, before, guarded)
        else:
            at, out = victim(c, l, before, guarded)
        if out < 0:
            return False
        if c.note[S.BYPASS] and kept:
            mine = c.real[S.KEEP, l, e] * c.factor[S.SCALE, l]
            theirs = c.real[S.KEEP, at, out] * c.factor[S.SCALE, at]
            if mine < theirs:
                return False
        if c.note[S.ONLY_BETTER] and not kept and c.real[S.KEEP, l, e] <= c.real[S.KEEP, at, out]:
            return False
        evict(c, at, out)
    return True


@compiled
def protect(c, l, e):
    """SLRU: a second use makes an expert protected; the protected part's oldest makes place for it."""
    group = c.layer[S.GROUP, l]
    limit = c.number[S.SHARE] * c.group[S.CAPACITY, group]
    if c.cell[S.PART, l, e] != 2:
        c.cell[S.PART, l, e] = 2
        c.group[S.PART_BYTES, group] += c.cell[S.SIZE, l, e]
    while c.group[S.PART_BYTES, group] > limit:
        old_l = -1
        old = -1
        for i in range(c.layer.shape[1]):
            if c.layer[S.GROUP, i] != group:
                continue
            for at in range(c.layer[S.FILLED, i]):
                x = c.cell[S.SLOT, i, at]
                if c.cell[S.PART, i, x] != 2:
                    continue
                if old < 0 or c.cell[S.STAMPED, i, x] < c.cell[S.STAMPED, old_l, old]:
                    old_l, old = i, x
        if old < 0:
            return
        c.cell[S.PART, old_l, old] = 1
        c.group[S.PART_BYTES, group] -= c.cell[S.SIZE, old_l, old]
        c.note[S.STAMP] += 1
        c.cell[S.STAMPED, old_l, old] = c.note[S.STAMP]
        c.real[S.KEEP, old_l, old] = c.note[S.STAMP]
        c.layer[S.STALE, old_l] = 1


PROTECTED = 1e15
"""Above every stamp: what is protected leaves after all that is not."""


@inlined
def touch(c, l, n):
    """Update what the event's experts are worth; the first of them counts as the latest used."""
    rule = c.note[S.RULE]
    for j in range(n):
        i = n - 1 - j
        e = c.event[S.IDS, i]
        c.note[S.STAMP] += 1
        c.cell[S.STAMPED, l, e] = c.note[S.STAMP]
        if rule == S.RECENCY:
            c.real[S.KEEP, l, e] = c.note[S.STAMP]
        elif rule == S.COUNT or rule == S.LAYER_AGE:
            c.real[S.KEEP, l, e] += c.number[S.GAIN]
        elif rule == S.RESIDENT_COUNT:
            c.real[S.KEEP, l, e] = c.real[S.KEEP, l, e] + 1 if c.event[S.ACT, i] == S.HIT else 1.0
        elif rule == S.FUTURE:
            c.real[S.KEEP, l, e] = -c.event[S.NEXT, i]
        elif rule == S.SEGMENTS:
            if c.event[S.ACT, i] == S.HIT:
                protect(c, l, e)
            else:
                c.cell[S.PART, l, e] = 1
            c.real[S.KEEP, l, e] = c.note[S.STAMP] + (PROTECTED if c.cell[S.PART, l, e] == 2 else 0.0)
        elif rule == S.ARC:
            arc_hit(c, l, e, c.event[S.ACT, i] == S.HIT and not c.event[S.GUESSED, i])
    c.layer[S.STALE, l] = 1


@inlined
def look_up(c, l, n):
    """Say of every expert of the event whether it is here, and pin it."""
    c.note[S.SERIAL] += 1
    c.note[S.GONE] = 0
    for i in range(n):
        e = c.event[S.IDS, i]
        r = c.cell[S.RESIDENT, l, e]
        c.event[S.ACT, i] = S.HIT if r == S.HERE or r == S.STAGED else (S.LOAD if r == S.ABSENT else S.LATE)
        c.event[S.ON_HOST, i] = 0
        c.event[S.GUESSED, i] = c.cell[S.GUESS, l, e]
        c.cell[S.USED_AT, l, e] = c.note[S.SERIAL]
        if r != S.ABSENT and c.cell[S.GUESS, l, e]:
            c.cell[S.GUESS, l, e] = 0
            c.layer[S.GUESSES, l] -= 1
            c.note[S.SPENT] += c.cell[S.SIZE, l, e]
        if r == S.COMING or r == S.STAGING:
            c.cell[S.RESIDENT, l, e] = S.HERE if r == S.COMING else S.STAGED


@inlined
def bring_in(c, l, n, tokens):
    """Give every missing expert that does not run on the host a place, or let it stream through."""
    before = c.note[S.SERIAL] if c.note[S.PINS] else c.note[S.SERIAL] + 1
    wave = c.note[S.BYPASS_TOKENS] > 0 and tokens >= c.note[S.BYPASS_TOKENS]
    group = c.layer[S.GROUP, l]
    for i in range(n):
        e = c.event[S.IDS, i]
        staged = c.cell[S.RESIDENT, l, e] == S.STAGED
        if staged:
            drop(c, l, e)
        if (c.event[S.ACT, i] == S.LOAD and not c.event[S.ON_HOST, i]) or staged:
            free = c.group[S.ROOM, group] >= c.cell[S.SIZE, l, e]
            if c.note[S.ADMIT] and (free or not wave) and make_room(c, l, e, before, c.note[S.SERIAL] + DEMAND):
                put(c, l, e, S.HERE)
                if c.note[S.RULE] == S.ARC:
                    arc_admit(c, l, e)
            elif not staged:
                c.event[S.ACT, i] = S.STREAM
    if not c.note[S.PINS]:
        for i in range(n):
            if c.event[S.ACT, i] == S.LOAD and c.cell[S.RESIDENT, l, c.event[S.IDS, i]] == S.ABSENT:
                c.event[S.ACT, i] = S.STREAM
    c.layer[S.STALE, l] = 1


@inlined
def settle(c, l):
    """After an event, guesses about its layer that it did not use are the first to leave; those on the way turn back."""
    if not c.layer[S.GUESSES, l]:
        return
    for e in range(c.layer[S.EXPERTS, l]):
        if not c.cell[S.GUESS, l, e]:
            continue
        r = c.cell[S.RESIDENT, l, e]
        if r != S.HERE:
            forget_guess(c, l, e, c.cell[S.SIZE, l, e] if r == S.STAGED else 0)
            drop(c, l, e)
        else:
            c.real[S.KEEP, l, e] = S.LOWEST
            c.cell[S.STAMPED, l, e] = 0
    c.layer[S.STALE, l] = 1


@compiled
def reserve(c, l, e):
    """Make room for a guess and mark it as on its way. False where nothing may leave for it."""
    size = c.cell[S.SIZE, l, e]
    if c.note[S.STAGE]:
        if c.note[S.STAGE_ROOM] < size:
            return False
        c.note[S.STAGE_ROOM] -= size
        c.cell[S.RESIDENT, l, e] = S.STAGING
    else:
        if not c.note[S.ADMIT]:
            return False
        before = c.note[S.STEP_SERIAL]
        if not make_room(c, l, e, before, before):
            return False
        put(c, l, e, S.COMING)
        if c.note[S.RULE] == S.ARC:
            arc_admit(c, l, e)
        elif c.note[S.RULE] == S.RECENCY or c.note[S.RULE] == S.SEGMENTS:
            c.note[S.STAMP] += 1
            c.cell[S.STAMPED, l, e] = c.note[S.STAMP]
            c.cell[S.PART, l, e] = 1
            c.real[S.KEEP, l, e] = c.note[S.STAMP]
        elif c.note[S.RULE] == S.FUTURE:
            c.real[S.KEEP, l, e] = 0.0  # needed before all that is kept
    c.cell[S.GUESS, l, e] = 1
    c.layer[S.GUESSES, l] += 1
    return True


@compiled
def arrived(c, l, e):
    """A guess that was on its way can be used."""
    c.cell[S.RESIDENT, l, e] = S.HERE if c.cell[S.RESIDENT, l, e] == S.COMING else S.STAGED
    c.layer[S.STALE, l] = 1


@compiled
def turn_back(c, l, e):
    """A guess that was on its way will not come."""
    if c.cell[S.RESIDENT, l, e] == S.COMING or c.cell[S.RESIDENT, l, e] == S.STAGING:
        forget_guess(c, l, e, 0)
        drop(c, l, e)


@compiled
def resize(c, slots_L):
    """Between passes, give every layer so many slots; what no longer fits leaves, worst first."""
    for l in range(c.layer.shape[1]):
        capacity = slots_L[l] * c.layer[S.BYTES, l]
        group = c.layer[S.GROUP, l]
        c.group[S.ROOM, group] += capacity - c.group[S.CAPACITY, group]
        c.group[S.CAPACITY, group] = capacity
        while c.group[S.ROOM, group] < 0:
            out = worst_of(c, l, c.note[S.SERIAL] + 1, c.note[S.SERIAL] + 1)
            if out < 0:
                break
            evict(c, l, out)
