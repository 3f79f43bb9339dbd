"""ARC inside one layer: experts used once and used again, two ghost lists, and a split that follows their hits.

cell[PART] is the list of an expert: 1 used once (T1), 2 used again (T2), 3 and 4 their ghosts (B1, B2), 0 none.
factor[TARGET] is the size that T1 aims at. The oldest of a list is the one with the smallest stamp.
"""

from __future__ import annotations

from moesaic.trace.policies import state as S
from moesaic.trace.policies.loops import compiled


@compiled
def _count(c, l, part):
    return c.layer[S.PARTS + part, l]


@compiled
def move_to(c, l, e, part):
    """Put an expert on another list."""
    c.layer[S.PARTS + c.cell[S.PART, l, e], l] -= 1
    c.layer[S.PARTS + part, l] += 1
    c.cell[S.PART, l, e] = part


@compiled
def _oldest(c, l, part, before, guarded):
    """Oldest of a list; of the resident lists, one that may leave. -1 where there is none."""
    best = -1
    for e in range(c.layer[S.EXPERTS, l]):
        if c.cell[S.PART, l, e] != part:
            continue
        if part <= 2 and (
            c.cell[S.RESIDENT, l, e] != S.HERE or c.cell[S.USED_AT, l, e] >= before or c.cell[S.GUARD, l, e] >= guarded
        ):
            continue
        if best < 0 or c.cell[S.STAMPED, l, e] < c.cell[S.STAMPED, l, best]:
            best = e
    return best


@compiled
def arc_hit(c, l, e, hit):
    """Move a used expert to T2 on a hit; on a ghost hit, shift the split. Called before room is made for a miss."""
    part = c.cell[S.PART, l, e]
    if hit:
        move_to(c, l, e, 2)
    elif part == 3 or part == 4:
        size = c.group[S.CAPACITY, c.layer[S.GROUP, l]] // c.layer[S.BYTES, l]
        once, twice = _count(c, l, 3), _count(c, l, 4)
        if part == 3:
            c.factor[S.TARGET, l] = min(float(size), c.factor[S.TARGET, l] + max(1.0, twice / once))
        else:
            c.factor[S.TARGET, l] = max(0.0, c.factor[S.TARGET, l] - max(1.0, once / twice))


@compiled
def arc_victim(c, l, e, before, guarded):
    """Who leaves for expert e (its list says what kind of miss it is); becomes a ghost of its list."""
    size = c.group[S.CAPACITY, c.layer[S.GROUP, l]] // c.layer[S.BYTES, l]
    part = c.cell[S.PART, l, e]
    once = _count(c, l, 1)
    no_ghost = part < 3 and once >= size
    first = 1 if once > 0 and (once > c.factor[S.TARGET, l] or (part == 4 and once == c.factor[S.TARGET, l])) else 2
    if no_ghost:
        first = 1
    out = _oldest(c, l, first, before, guarded)
    if out < 0:
        out = _oldest(c, l, 3 - first, before, guarded)
        no_ghost = False
    if out >= 0:
        move_to(c, l, out, 0 if no_ghost else c.cell[S.PART, l, out] + 2)
    return out


@compiled
def arc_admit(c, l, e):
    """Put an admitted expert on its list: T2 when it comes back from the ghosts, else T1; then trim the ghosts."""
    size = c.group[S.CAPACITY, c.layer[S.GROUP, l]] // c.layer[S.BYTES, l]
    part = c.cell[S.PART, l, e]
    move_to(c, l, e, 2 if part >= 2 else 1)
    while _count(c, l, 1) + _count(c, l, 3) > size:
        ghost = _oldest(c, l, 3, 0, 0)
        if ghost < 0:
            break
        move_to(c, l, ghost, 0)
    while _count(c, l, 1) + _count(c, l, 2) + _count(c, l, 3) + _count(c, l, 4) > 2 * size:
        ghost = _oldest(c, l, 4, 0, 0)
        if ghost < 0:
            ghost = _oldest(c, l, 3, 0, 0)
        if ghost < 0:
            break
        move_to(c, l, ghost, 0)
