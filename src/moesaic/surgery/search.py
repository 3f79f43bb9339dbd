"""Search among sets of experts to drop: all of them, one after another, or by a genetic algorithm.

`error(dropped)` is any function of a sorted tuple of expert numbers; every search asks it once per set. Group-limited routers
lose as many experts in every group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, product
from math import comb

import numpy as np

Dropped = tuple[int, ...]
Error = Callable[[Dropped], float]
Found = list[tuple[float, Dropped]]
"""The best sets found, best first."""


def count(experts: int, drop: int, groups: int = 1) -> int:
    """How many sets there are."""
    return comb(experts // groups, drop // groups) ** groups


def every(experts: int, drop: int, groups: int = 1) -> Iterator[Dropped]:
    """All sets, in lexicographic order within each group."""
    size = experts // groups
    parts = [combinations(range(g * size, (g + 1) * size), drop // groups) for g in range(groups)]
    for chosen in product(*parts):
        yield tuple(e for part in chosen for e in part)


def exhaustive(error: Error, experts: int, drop: int, groups: int = 1, best: int = 1) -> Found:
    return sorted((error(dropped), dropped) for dropped in every(experts, drop, groups))[:best]


def greedy(error: Error, experts: int, drop: int, groups: int = 1) -> Found:
    """Drop the expert whose loss costs least, given those already gone, until `drop` are."""
    size, each = experts // groups, drop // groups
    gone: Dropped = ()
    cost = error(())
    for _ in range(drop):
        full = {g for g in range(groups) if sum(e // size == g for e in gone) == each}
        open_ = [e for e in range(experts) if e not in gone and e // size not in full]
        cost, gone = min((error(tuple(sorted((*gone, e)))), tuple(sorted((*gone, e)))) for e in open_)
    return [(cost, gone)]


def genetic(
    error: Error,
    experts: int,
    drop: int,
    groups: int = 1,
    *,
    population: int = 100,
    generations: int = 50,
    mutation: float = 0.1,
    seed: int = 0,
    best: int = 1,
) -> Found:
    """Sets of a fixed size evolve: the better half stays, children take experts from both parents, some swap one.

    Where a population holds every set there is, it is simply all of them.
    """
    if count(experts, drop, groups) <= population:
        return exhaustive(error, experts, drop, groups, best)
    rng, size, each = np.random.default_rng(seed), experts // groups, drop // groups
    known: dict[Dropped, float] = {}

    def cost(dropped: Dropped) -> float:
        if dropped not in known:
            known[dropped] = error(dropped)
        return known[dropped]

    def draw(pools: list[list[int]]) -> Dropped:
        return tuple(sorted(int(e) for pool in pools for e in rng.choice(pool, each, replace=False)))

    def child(one: Dropped, other: Dropped) -> Dropped:
        pools = [sorted({e for e in (*one, *other) if e // size == g}) for g in range(groups)]
        made = draw(pools)
        if rng.random() < mutation:
            out = int(rng.choice(made))
            free = [e for e in range(out // size * size, (out // size + 1) * size) if e not in made]
            made = tuple(sorted({*made, int(rng.choice(free))} - {out})) if free else made
        return made

    whole = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    alive = [draw(whole) for _ in range(population)]
    for _ in range(generations):
        alive = sorted(set(alive), key=lambda dropped: (cost(dropped), dropped))[: max(2, population // 2)]
        while len(alive) < 2:
            alive.append(draw(whole))
        pairs = rng.integers(0, len(alive), (population - len(alive), 2))
        alive += [child(alive[a], alive[b]) for a, b in pairs]
    for dropped in alive:
        cost(dropped)
    return sorted((value, dropped) for dropped, value in known.items())[:best]
