"""Write safetensors files piece by piece: headers first, then bytes as they come, whole files or none.

Tensors that are copied keep the place in a cache line that they had, because the last bits of some fp32 products depend on
it; spaces at the end of a header make room for that, and the format allows no other holes.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from moesaic.core.files import replacing, write_atomically
from moesaic.store.packed import NAMES
from moesaic.store.reader import Reader
from moesaic.store.slots import LINE
from moesaic.store.table import INDEX, METADATA, SINGLE, Range

MOST_BYTES = 4 << 30
"""Of one file."""

PIECE = 32 << 20
"""Bytes copied at a time."""


def header(
    entries: Iterable[tuple[str, torch.dtype, Sequence[int]]], metadata: dict[str, str], multiple: int, residue: int = 0
) -> bytes:
    """A header of (name, dtype, shape) one after another, after which data begins at `residue` past a multiple of bytes."""
    made: dict[str, object] = {METADATA: metadata}
    at = 0
    for name, dtype, shape in entries:
        end = at + math.prod(shape) * dtype.itemsize
        made[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(made, separators=(",", ":")).encode()
    text += b" " * ((residue - 8 - len(text)) % multiple)
    return len(text).to_bytes(8, "little") + text


def shards(tensors: Iterable[Range], most: int = MOST_BYTES) -> list[list[Range]]:
    """Tensors in their order, as far as each can begin where in a cache line it does now, in files of at most `most` bytes."""
    by_place: dict[int, deque[Range]] = {}
    for tensor in tensors:
        by_place.setdefault(tensor.start % LINE, deque()).append(tensor)
    files: list[list[Range]] = []
    at = size = 0
    while by_place:
        fits = by_place.get(at % LINE)
        if not files or fits is None or (files[-1] and size + fits[0].nbytes > most):
            fits = next(iter(by_place.values()))
            files.append([])
            at, size = fits[0].start % LINE, 0
        tensor = fits.popleft()
        if not fits:
            del by_place[tensor.start % LINE]
        files[-1].append(tensor)
        at, size = at + tensor.nbytes, size + tensor.nbytes
    return files


def copy_tensors(
    tensors: Iterable[Range], folder: Path, reader: Reader, most: int = MOST_BYTES, step: Callable[[int], None] = lambda n: None
) -> list[Path]:
    """Write tensors as a model folder's weights, one file or shards with an index; files that are there stay.

    `step(bytes)` is called as they are written. Raises BadInput naming the file, ReadFailed.
    """
    files = shards(tensors, most) or [[]]
    paths = [
        folder / (SINGLE if len(files) == 1 else f"model-{i:05}-of-{len(files):05}.safetensors")
        for i in range(1, len(files) + 1)
    ]
    for path, mine in zip(paths, files, strict=True):
        if path.is_file():  # it was renamed when it was whole
            step(sum(tensor.nbytes for tensor in mine))
            continue
        head = header(((t.name, t.dtype, t.shape) for t in mine), {"format": "pt"}, LINE, mine[0].start % LINE if mine else 0)
        with replacing(path) as scratch, scratch.open("wb") as stream:
            stream.write(head)
            for tensor in mine:
                for first in range(0, tensor.nbytes, PIECE):
                    piece = tensor.piece(first, min(PIECE, tensor.nbytes - first))
                    stream.write(reader.read(piece).numpy().data)
                    step(piece.nbytes)
    if len(files) > 1:
        weight_map = {tensor.name: path.name for path, mine in zip(paths, files, strict=True) for tensor in mine}
        size = sum(tensor.nbytes for mine in files for tensor in mine)
        write_atomically(folder / INDEX, json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return paths


def settle(folder: Path) -> None:
    """Have names in a folder reach the disk."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
