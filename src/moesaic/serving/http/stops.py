"""Stop strings in a stream: nothing is given out that may yet turn out to be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Text in, text out, and an end at the first stop string, which is never part of what came out."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain now. After `stopped`, nothing more comes."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        self._held += text
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = max(overlap(self._held, stop) for stop in self._stops)
        at = len(self._held) - keep
        out, self._held = self._held[:at], self._held[at:]
        return out

    def flush(self) -> str:
        """What was held back, when the text ends without a stop string."""
        out, self._held = self._held, ""
        return out


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, and is not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
