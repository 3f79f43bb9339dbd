"""One expert from disk into a slot: straight into place where its bytes allow, else read aside, converted and copied."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moesaic.serving.streamed.sources import Source
from moesaic.store import Range, Reader, Ticket


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


def in_place(source: Source, dtype: torch.dtype) -> bool:
    """Whether an expert's stored bytes are the very bytes of its slot."""
    return source.order is not None and source.ranges(0)[0].dtype == dtype


def fetch(reader: Reader, e: int, matrices: list[tuple[Source, Tensor]]) -> Fetch:
    """Begin to read expert e of each source into its matrix, one slot's `[., .]`."""
    pieces: list[tuple[Range, Tensor]] = []
    after: list[Callable[[], None]] = []
    for source, matrix in matrices:
        ranges = source.ranges(e)
        if in_place(source, matrix.dtype):
            assert source.order is not None
            ordered = [ranges[i] for i in source.order]
            parts = matrix.view(-1).split([stored.nbytes // matrix.element_size() for stored in ordered])
            pieces += zip(ordered, parts, strict=True)
        else:
            read = [torch.empty(stored.shape, dtype=stored.dtype) for stored in ranges]
            pieces += zip(ranges, read, strict=True)
            after.append(_placing(source, matrix, read))
    return Fetch(reader.fetch(pieces), after)


def _placing(source: Source, matrix: Tensor, read: list[Tensor]) -> Callable[[], None]:
    def place() -> None:
        if source.order is None:
            matrix.copy_(source.assemble(read))
            return
        flat, at = matrix.view(-1), 0
        for i in source.order:
            flat[at : at + read[i].numel()].copy_(read[i].reshape(-1))
            at += read[i].numel()

    return place
