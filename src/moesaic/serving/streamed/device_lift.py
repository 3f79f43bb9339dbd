"""One experts call under way between two tiers: what is on the device, what comes up, and what the host computes.

Copies of several experts are under way while the first is computed; a staging slot is filled again as soon as what it held
was computed. What the host holds for a moment only is copied, or computed, before the next is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moesaic.kernels.in_order import Piece
from moesaic.kernels.products import Span
from moesaic.serving.streamed.devices import Copy

if TYPE_CHECKING:
    from moesaic.serving.streamed.device_tier import DeviceLayer, DeviceTier

AHEAD = 8
"""Copies under way beyond the one that is computed next."""


class Lift:
    """`loads` have slots and are copied into them; `host` runs where it lies; the rest of `missing` passes through staging."""

    def __init__(self, tier: DeviceTier, layer: DeviceLayer, missing: set[int], loads: set[int], host: set[int]) -> None:
        self.tier, self.layer, self.loads, self.host, self.missing = tier, layer, loads, host, missing
        self.began = tier.device.mark()
        self._here: deque[Piece] = deque()
        """Of `missing`, in order: in host memory now; its slots there are those of the pieces."""
        self._flying: dict[int, tuple[int, Copy]] = {}

    def order(self, spans: list[Span]) -> list[Span]:
        """As given where sums follow it; else what is on the device first, then what comes, then what the host computes."""
        if self.tier.device.ordered:
            return spans
        return sorted(spans, key=lambda span: (span[0] in self.missing) + (span[0] in self.host))

    def parts(self, spans: list[Span], arriving: Iterator[list[Span]]) -> Iterator[tuple[bool, list[Piece]]]:
        """(whether the host computes them, experts), each expert once. `spans` in the order of `order`; `arriving`: what the
        tier below says of those of them that are missing. A part's weights may be read until the next is asked for."""
        tier, run = self.tier, list[Piece]()
        waiting = deque(span for span in spans if span[0] in self.missing)
        for e, start, end in spans:
            if e not in self.missing:
                run.append(Piece(e, self.layer.held[e], start, end))
                continue
            if run:
                yield False, run
                run = []
            if not self._here:
                tier.settle()
                self._here.extend(Piece(waiting.popleft()[0], *span) for span in next(arriving))
            self._ask()
            piece = self._here.popleft()
            if e in self.host:
                yield True, [piece]
                continue
            slot, copy = self._flying.pop(e)
            tier.stats.stall_seconds += copy.order()
            yield False, [Piece(e, slot, start, end)]
            if e not in self.loads:
                self.layer.free.append((slot, tier.device.mark()))
        if run:
            yield False, run

    def _ask(self) -> None:
        """Keep some copies under way, in the order in which they will be computed; always that of the first."""
        for piece in self._here:
            if len(self._flying) > AHEAD:
                return
            if piece.e in self.host or piece.e in self._flying:
                continue
            after: Any = self.began
            if piece.e in self.loads:
                slot = self.layer.held[piece.e]
            elif self.layer.free:
                slot, used = self.layer.free.popleft()
                after = used or self.began
            else:
                return
            self._flying[piece.e] = slot, self.tier.copy(self.layer, piece.e, slot, piece.slot, after)
