"""One experts call under way: what it loads into the cache, and what streams through the staging slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from moesaic.kernels.products import Span
from moesaic.serving.streamed.layer import Layer
from moesaic.store import ReadFailed
from moesaic.view.skeleton.fetch import Fetch

if TYPE_CHECKING:
    from moesaic.serving.streamed.engine import Engine

AHEAD, AHEAD_ASIDE = 8, 2
"""Experts asked for before the first has come; fewer where each is read aside first, which takes memory of its own."""


class Wave:
    """`loads` have slots and are read into them; `streamed` pass through staging slots; `late` were on their way before.

    Reads of late ones that failed are done again, as any miss is.
    """

    def __init__(
        self, engine: Engine, layer: Layer, loads: list[int], streamed: set[int], late: dict[int, Fetch] | None = None
    ) -> None:
        self.engine, self.layer, self.streamed = engine, layer, streamed
        self.free = [engine._staging[kind] for kind in layer.kinds]
        self.ahead = AHEAD_ASIDE if layer.aside else AHEAD
        self.late = set(late or ())
        self.passing: list[int] = []
        """Experts with a slot that have no place in the cache any more: given back after the call."""
        self.queue, self.coming = deque(loads), dict(late or {})
        self.ask()

    def ask(self) -> None:
        """Keep some loads in flight, in the order in which they will be computed: what was on its way before does not count,
        or a load would be computed before it was asked for."""
        while self.queue and len(self.coming.keys() - self.late) < self.ahead:
            e = self.queue.popleft()
            self.coming[e] = self.engine._into(self.layer, e, self.layer.held[e])

    def leave(self, experts: set[int]) -> dict[int, Fetch]:
        """Reads of these loads, which somebody else will wait for."""
        for e in [e for e in self.queue if e in experts]:
            self.queue.remove(e)
            self.coming[e] = self.engine._into(self.layer, e, self.layer.held[e])
        return {e: self.coming.pop(e) for e in experts if e in self.coming}

    def _arrived(self, e: int, fetched: Fetch) -> None:
        stats = self.engine._stats
        self.coming.pop(e, None)
        try:
            stats.stall_seconds += fetched.wait()
        except ReadFailed:
            if e not in self.late:
                raise
            stats.prefetch_failed += 1  # a guess that failed is a miss
            self.engine.prefetch.retire(self.layer, self.layer.held.pop(e), fetched)
            slot = self.engine._take(self.layer, e)
            stats.stall_seconds += self.engine._into(self.layer, e, slot).wait()

    def parts(self, spans: list[Span], matrix: int | None) -> Iterator[list[Span]]:
        """See kernels/waves.py: the longest run of spans that is here, at least one, until all were given."""
        queue = deque(e for e, _, _ in spans if e in self.streamed)
        staged: dict[int, tuple[int, Fetch]] = {}
        at = 0
        while at < len(spans):
            part: list[Span] = []
            while at < len(spans):
                self.ask()
                while queue and len(staged) < self.ahead and (free := self.free[self.layer.kind_E[queue[0]]]):
                    e = queue.popleft()
                    slot = self.layer.slot(e, free.pop())
                    staged[e] = slot, self.engine._into(self.layer, e, slot, matrix)
                e, start, end = spans[at]
                if e in self.streamed and e not in staged:
                    break  # this part holds every staging slot: compute it first
                assert e not in self.queue, f"{self.layer.block.name}: expert {e} was never asked for"
                fetched = staged[e][1] if e in staged else self.coming.get(e)
                if fetched is not None:
                    if part and not fetched.done:
                        break  # compute what is here while it comes
                    if e in staged:
                        self.engine._stats.stall_seconds += fetched.wait()
                    else:
                        self._arrived(e, fetched)
                part.append((staged[e][0] if e in staged else self.layer.held[e], start, end))
                at += 1
            assert part, f"{self.layer.block.name}: no room to stream through"
            yield part
            used = {slot for slot, _, _ in part}
            for e in [e for e, (slot, _) in staged.items() if slot in used]:
                self.free[self.layer.kind_E[e]].append(self.layer.place(staged.pop(e)[0])[1])
