"""Where the experts of a packed folder lie: the same questions as to any checkpoint's (sources.py), with simple answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.store import Range
from moesaic.store.packed import Block, Packed
from moesaic.view import packed as view_packed
from moesaic.view.skeleton.sources import Source


class PackedSource:
    """One stacked parameter of a packed folder; see `Source`, whose place it takes."""

    order: list[int] | None

    def __init__(self, packed: Packed, block: Block, which: int) -> None:
        self.packed, self.block, self.which = packed, block, which
        self.shape, self.order = block.shapes[which], [0]

    def ranges(self, e: int) -> list[Range]:
        return [self.packed.matrix(self.block, e, self.which)]

    def scale_ranges(self, e: int) -> list[Range]:
        return []

    def shift(self, e: int, dtype: torch.dtype) -> int:
        return view_packed.shift_of(self.block, self.which, e, dtype)

    def made(self, e: int, read: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        return [view_packed.unpacked(read[0], self.packed, self.block, e, self.which)]

    def assemble(self, read: Sequence[Tensor]) -> Tensor:
        return read[0]


Sourced = Source | PackedSource


def find(model: Any, packed: Packed) -> dict[str, Sourced]:
    """The source of each stacked parameter. Raises BadInput where the packing is not of this model."""
    return {name: PackedSource(packed, *place) for name, place in view_packed.places(model, packed).items()}
