"""One expert from disk into a slot: straight into place where its bytes allow, else read aside, converted and copied."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moesaic.store import Range, Reader, Ticket
from moesaic.view.skeleton.packed_sources import Sourced


class Fetch:
    """Matrices of one expert on their way into their slots; `wait` before they are used."""

    def __init__(self, ticket: Ticket, after: list[Callable[[], None]]) -> None:
        self._ticket, self._after = ticket, after

    @property
    def done(self) -> bool:
        return self._ticket.done

    def wait(self) -> float:
        """Seconds waited. Raises ReadFailed."""
        waited = self._ticket.wait()
        for finish in self._after:
            finish()
        self._after = []
        return waited

    def hurry(self) -> None:
        """It is wanted now: as urgent as any demand."""
        self._ticket.hurry()

    def drop(self) -> None:
        """Nobody wants it any more. The slots may still be written to until `idle`."""
        self._after = []
        self._ticket.drop()

    @property
    def idle(self) -> bool:
        return self._ticket.idle

    @property
    def moved_bytes(self) -> int:
        """Bytes that were read for it so far."""
        return self._ticket.moved_bytes


def in_place(source: Sourced, e: int, dtype: torch.dtype) -> bool:
    """Whether the stored bytes of expert e are the very bytes of its slot."""
    return source.order is not None and source.ranges(e)[0].dtype == dtype


def fetch(reader: Reader, e: int, matrices: list[tuple[Sourced, Tensor]], prefetch: bool = False) -> Fetch:
    """Begin to read expert e of each source into its matrix, one slot's `[., .]`; a prefetch waits behind every demand."""
    pieces: list[tuple[Range, Tensor]] = []
    after: list[Callable[[], None]] = []
    for source, matrix in matrices:
        ranges = source.ranges(e)
        if in_place(source, e, matrix.dtype):
            assert source.order is not None
            ordered = [ranges[i] for i in source.order]
            parts = matrix.view(-1).split([stored.nbytes // matrix.element_size() for stored in ordered])
            pieces += zip(ordered, parts, strict=True)
        else:
            scales = source.scale_ranges(e)
            read = [torch.empty(stored.shape, dtype=stored.dtype) for stored in (*ranges, *scales)]
            pieces += zip((*ranges, *scales), read, strict=True)
            after.append(_placing(source, e, matrix, read))
    return Fetch(reader.fetch(pieces, prefetch), after)


def _placing(source: Sourced, e: int, matrix: Tensor, read: list[Tensor]) -> Callable[[], None]:
    def place() -> None:
        made = source.made(e, read, matrix.dtype)
        if source.order is None:
            matrix.copy_(source.assemble(made))
            return
        flat, at = matrix.view(-1), 0
        for i in source.order:
            flat[at : at + made[i].numel()].copy_(made[i].reshape(-1))
            at += made[i].numel()

    return place
