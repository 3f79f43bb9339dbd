"""The bytes of a `.moetrace`: one safetensors blob, or, while a capture is still writing, several one after another.

A finished trace is an ordinary safetensors file. A capture appends one complete blob per flush, so whatever kills it, all
blobs but an unfinished last one can be read. Columns are memory-mapped; nothing is read before it is looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from moesaic.core.errors import BadInput

Columns = dict[str, np.ndarray]

_DTYPES = {
    "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8",
    "F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "?",
}  # fmt: skip
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items()}
LARGEST_HEADER = 100_000_000
"""What safetensors itself allows; a longer one means that this is no such file."""


class Segment(NamedTuple):
    metadata: dict[str, str]
    columns: Columns


class Segments(NamedTuple):
    found: list[Segment]
    lost_bytes: int
    """Bytes of an unfinished last blob, which are not read."""


def header(shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """Header bytes of a blob and where each column starts after it. Wide items come first, so that all are aligned."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    at, starts = 0, {}
    for name, (dtype, shape) in sorted(shapes.items(), key=lambda item: -item[1][0].itemsize):
        size = dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        starts[name] = at
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts


def append(stream: BinaryIO, columns: Columns, metadata: dict[str, str]) -> None:
    """Write one blob at the end of `stream` and hand it to the operating system, padded so that the next one is aligned."""
    columns = {name: np.ascontiguousarray(array) for name, array in columns.items()}
    spare = -sum(array.nbytes for array in columns.values()) % 8
    if spare:
        columns["padding"] = np.zeros(spare, np.uint8)
    head, starts = header({name: (array.dtype, array.shape) for name, array in columns.items()}, metadata)
    stream.write(head)
    for name in starts:
        stream.write(columns[name].data if columns[name].size else b"")
    stream.flush()


def read(path: Path) -> Segments:
    """Every complete blob of a file. Raises BadInput for a file that is none, or whose first blob is not whole."""
    try:
        size = path.stat().st_size
        stream = path.open("rb")
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from error
    found: list[Segment] = []
    at = 0
    with stream:
        for start, entries, begin, end in _blobs(stream, path, size):
            if end > size:
                if not found:
                    raise BadInput(f"{path} is truncated: it has {size:,} of {end:,} bytes; copy or record it again")
                return Segments(found, size - start)
            found.append(_map(path, entries, begin))
            at = end
    return Segments(found, size - at)


def _blobs(stream: BinaryIO, path: Path, size: int) -> Iterator[tuple[int, dict[str, Any], int, int]]:
    """Start of each blob, its header, and where its data begins and ends (perhaps past the end of the file)."""
    at = 0
    while at < size:
        stream.seek(at)
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if at == 0 and (len(prefix) < 8 or not 2 <= length <= LARGEST_HEADER):
            raise BadInput(f"{path} is no routing trace: it does not begin with a safetensors header")
        text = stream.read(min(length, LARGEST_HEADER))
        if len(prefix) < 8 or len(text) < length:
            if at == 0:
                raise BadInput(f"{path} is truncated inside its header; copy or record it again")
            return
        try:
            entries = json.loads(text)
            end = max((int(e["data_offsets"][1]) for n, e in entries.items() if n != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            if at:
                return  # zeros after a power cut: what came before it is whole
            raise BadInput(f"{path} is no routing trace: its header is no safetensors header") from error
        begin = at + 8 + length
        yield at, entries, begin, begin + end
        at = begin + end


def _map(path: Path, entries: dict[str, Any], begin: int) -> Segment:
    columns: Columns = {}
    try:
        for name, entry in entries.items():
            if name in ("__metadata__", "padding"):
                continue
            dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(int(n) for n in entry["shape"])
            first, last = entry["data_offsets"]
            if last - first != dtype.itemsize * math.prod(shape) or min(shape, default=0) < 0:
                raise BadInput(f"{path}: column {name!r} has {last - first} bytes for shape {list(shape)}")
            if math.prod(shape):
                columns[name] = np.memmap(path, dtype, "r", begin + first, shape)
            else:
                columns[name] = np.zeros(shape, dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: broken description of a column ({error})") from error
    return Segment(dict(entries.get("__metadata__") or {}), columns)
