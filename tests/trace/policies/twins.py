"""Naive twins: plain dictionaries and lists, an expert at a time, that must count what the compiled policies count."""

from __future__ import annotations

import numpy as np


def events_of(trace):
    """Pass by pass: (layer, distinct experts, most tokens first, ties by first appearance)."""
    rows = trace.in_time()
    for step in np.unique(trace.step_T):
        mine = [r for r in rows if trace.step_T[r] == step]
        for layer in range(len(trace.layers)):
            chosen = [int(e) for r in mine for e in trace.experts_TLK[r, layer] if e != trace.empty]
            order = list(dict.fromkeys(chosen))
            yield layer, sorted(order, key=lambda e: -chosen.count(e))


class Twin:
    """A cache of `slots` per layer (a list) or in all (a number). Subclasses say who leaves."""

    def __init__(self, slots):
        self.slots, self.here, self.clock = slots, set(), 0
        self.hits = self.loads = self.streams = self.evictions = 0
        self.last, self.uses = {}, {}

    def group(self, layer):
        return {x for x in self.here if not isinstance(self.slots, list) or x[0] == layer}

    def room(self, layer):
        return (self.slots[layer] if isinstance(self.slots, list) else self.slots) - len(self.group(layer))

    def event(self, layer, experts):
        used = [(layer, e) for e in experts]
        hit = [x for x in used if x in self.here]
        self.hits += len(hit)
        for x in reversed(used):
            self.clock += 1
            self.last[x] = self.clock
            self.uses[x] = self.uses.get(x, 0) + 1
            self.touch(x, x in hit)
        for x in used:
            if x in self.here:
                continue
            if self.room(layer) < 1:
                free = [y for y in self.group(layer) if y not in used]
                if not free:
                    self.streams += 1
                    continue
                self.leave(min(free, key=self.worth))
            self.here.add(x)
            self.loads += 1

    def leave(self, x):
        self.here.discard(x)
        self.evictions += 1

    def touch(self, x, hit):
        pass


class LRU(Twin):
    def worth(self, x):
        return self.last[x]


class LFU(Twin):
    def worth(self, x):
        return self.uses[x], self.last[x]


class SLRU(Twin):
    def __init__(self, slots, share=0.8):
        super().__init__(slots)
        self.share, self.safe = share, set()

    def worth(self, x):
        return x in self.safe, self.last[x]

    def leave(self, x):
        super().leave(x)
        self.safe.discard(x)

    def touch(self, x, hit):
        if not hit:
            return
        self.safe.add(x)
        total = self.slots[x[0]] if isinstance(self.slots, list) else self.slots
        mine = {y for y in self.safe if not isinstance(self.slots, list) or y[0] == x[0]}
        while len(mine) > self.share * total:
            old = min(mine, key=lambda y: self.last[y])
            mine.discard(old)
            self.safe.discard(old)
            self.clock += 1
            self.last[old] = self.clock


def belady_hits(trace, slots):
    """Most hits with `slots` experts of one size in all: after each event, keep the best of what was here and was used."""
    events = list(events_of(trace))
    here, hits = set(), 0
    later = {}
    after = []
    for at in range(len(events) - 1, -1, -1):
        layer, experts = events[at]
        after.append({(layer, e): later.get((layer, e), 10**9) for e in experts})
        for e in experts:
            later[layer, e] = at
    next_use = {}
    for (layer, experts), nexts in zip(events, reversed(after), strict=True):
        used = {(layer, e) for e in experts}
        hits += len(used & here)
        next_use.update(nexts)
        here = set(sorted(here | used, key=lambda x: next_use[x])[:slots])
    return hits


class ARC:
    """Megiddo and Modha's ARC, an access at a time; lists are oldest first."""

    def __init__(self, size):
        self.size, self.target = size, 0.0
        self.once, self.twice, self.ghost1, self.ghost2 = [], [], [], []

    def _replace(self, x):
        if self.once and (len(self.once) > self.target or (x in self.ghost2 and len(self.once) == self.target)):
            self.ghost1.append(self.once.pop(0))
        else:
            self.ghost2.append(self.twice.pop(0))

    def access(self, x):
        """Whether it was a hit."""
        if x in self.once or x in self.twice:
            (self.once if x in self.once else self.twice).remove(x)
            self.twice.append(x)
            return True
        if x in self.ghost1 or x in self.ghost2:
            ratio = len(self.ghost2) / max(1, len(self.ghost1))
            if x in self.ghost1:
                self.target = min(self.size, self.target + max(1, ratio))
            else:
                self.target = max(0, self.target - max(1, 1 / ratio))
            full = len(self.once) + len(self.twice) >= self.size
            if full:
                self._replace(x)
            (self.ghost1 if x in self.ghost1 else self.ghost2).remove(x)
            self.twice.append(x)
            return False
        if len(self.once) + len(self.ghost1) == self.size:
            if len(self.once) < self.size:
                self.ghost1.pop(0)
                self._replace(x)
            else:
                self.once.pop(0)
        else:
            total = len(self.once) + len(self.twice) + len(self.ghost1) + len(self.ghost2)
            if total >= self.size:
                if total == 2 * self.size:
                    self.ghost2.pop(0)
                self._replace(x)
        self.once.append(x)
        return False
