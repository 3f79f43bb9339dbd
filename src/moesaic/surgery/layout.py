"""From a model's stacked experts back to the tensors that a checkpoint of its architecture holds them in.

`view/skeleton/sources.py` knows how an expert's matrix is made of stored tensors, each element exactly once. Here the same
way is gone backwards: where bytes only follow one another they are cut apart, else the elements' places are found by letting
their numbers take the way forward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.view.skeleton.sources import Source


def tensors(source: Source, stack: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Name in the checkpoint and tensor, of a stacked parameter [F, ., .] with no more experts than the source has.

    The inner width may differ from the source's. Raises BadInput for fp8, and where the way cannot be gone backwards.
    """
    shape = tuple(stack.shape[1:])
    first = source.ranges(0)
    if source.scales:
        raise BadInput(f"{first[0].path}: {source.name} is stored in fp8 with scales: surgery writes bf16, fp16 and fp32")
    shapes = piece_shapes(source, shape)
    places = None if source.order is not None else _places(source, shapes, shape)
    if source.stacked:
        pieces = [_pieces(source, matrix, shapes, places) for matrix in stack]
        for number, ranges in enumerate(source.lists.values()):
            yield ranges[0].name, torch.stack([made[number].reshape(shapes[number]) for made in pieces])
        return
    for f, matrix in enumerate(stack):
        for stored, piece, size in zip(source.ranges(f), _pieces(source, matrix, shapes, places), shapes, strict=True):
            yield stored.name, piece.reshape(size)


def piece_shapes(source: Source, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of the stored tensors of one expert whose matrix has another shape than the source's.

    Raises BadInput where that cannot be told.
    """
    stored = [one.shape[1:] if source.stacked else one.shape for one in source.ranges(0)]
    if shape == source.shape:
        return stored
    if source.rule is None and stored == [source.shape]:  # as it is, also where it is square
        return [shape]
    (old, new), *more = {(a, b) for a, b in zip(source.shape, shape, strict=True) if a != b}
    if more:
        raise BadInput(f"{source.name}: {list(source.shape)} cannot become {list(shape)}")
    options = []
    for one in stored:  # an axis as long as the old width, or a whole part of it, is the one that changes
        found = [one]
        for axis, n in enumerate(one):
            if old % n == 0 and new * n % old == 0:
                found.append((*one[:axis], new * n // old, *one[axis + 1 :]))
        options.append(found)
    for chosen in product(*options):
        if sum(math.prod(one) for one in chosen) == math.prod(shape):
            try:
                whole = _assembled(source, [torch.arange(math.prod(one)).view(one) for one in chosen], shape)
            except (ValueError, RuntimeError, TypeError):
                continue
            if whole.shape == shape:
                return list(chosen)
    raise BadInput(f"{source.name}: {list(source.shape)} cannot become {list(shape)}: its stored tensors have no such form")


def _assembled(source: Source, pieces: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    if source.rule is None:
        return pieces[0].reshape(shape)
    given = [piece[None] if source.stacked else piece for piece in pieces]
    return source.assemble(given, shape)


def _places(source: Source, shapes: list[tuple[int, ...]], shape: tuple[int, ...]) -> Tensor:
    """For each element of an expert's matrix, its place among those of its stored tensors, one after another."""
    numbers, at = [], 0
    for one in shapes:
        numbers.append(torch.arange(at, at + math.prod(one)).view(one))
        at += math.prod(one)
    return _assembled(source, numbers, shape).reshape(-1)


def _pieces(source: Source, matrix: Tensor, shapes: list[tuple[int, ...]], places: Tensor | None) -> list[Tensor]:
    """The stored tensors of one expert's matrix, flat, in the order of the rule's patterns."""
    sizes, flat = [math.prod(shape) for shape in shapes], matrix.reshape(-1)
    if places is not None:
        back = torch.empty_like(flat)
        back[places] = flat
        return list(back.split(sizes))
    assert source.order is not None
    parts = flat.split([sizes[i] for i in source.order])
    by_number = dict(zip(source.order, parts, strict=True))
    return [by_number[i] for i in range(len(sizes))]
