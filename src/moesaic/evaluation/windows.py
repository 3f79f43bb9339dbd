"""Sliding windows over a document: every token is scored exactly once, and late tokens keep a long context."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """Inputs `ids[start:end]`; the predictions of the last `scored` of them count (they predict up to `ids[end]`)."""

    document: int
    start: int
    end: int
    scored: int

    @property
    def length(self) -> int:
        return self.end - self.start


def windows(document: int, length: int, context: int, stride: int) -> Iterator[Window]:
    """Windows of a document of `length` ids, of which the first (the start token) is given and the others are scored.

    The first window scores up to `context` tokens; each later one `stride` more, with the ids before them as context:
    at least context - stride. The last window reaches back as far as the others, so that it is not short of context.
    """
    scored_to = 1
    while scored_to < length:
        target_end = min(length, scored_to + (context if scored_to == 1 else stride))
        end = target_end - 1
        yield Window(document, max(0, end - context), end, target_end - scored_to)
        scored_to = target_end


def batches(found: list[Window], batch_size: int) -> Iterator[list[Window]]:
    """Windows of near-equal length together, the longest first (so that memory fails at once, not at the end)."""
    order = sorted(found, key=lambda w: -w.length)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
