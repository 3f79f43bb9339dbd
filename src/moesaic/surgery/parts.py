"""Tensors of a result that are not in memory yet: bytes of an input, or made when they are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.store import Range, Reader


@dataclass(frozen=True)
class Lazy:
    """A tensor to be made when it is written: known by dtype and shape before."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


Part = Range | Lazy
"""What a tensor of the result is: bytes of an input, or made."""


def get(part: Part, reader: Reader) -> Tensor:
    """The tensor. Raises ValueError where it is not as announced: a mistake of the method."""
    if isinstance(part, Range):
        return reader.read(part)
    made = part.make()
    if made.shape != part.shape or made.dtype != part.dtype:
        raise ValueError(f"{made.dtype} {list(made.shape)} was made where {part.dtype} {list(part.shape)} was announced")
    return made
