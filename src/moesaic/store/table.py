"""Which bytes of which file hold a tensor: the headers of a checkpoint's safetensors files, checked before use.

Format: 8 bytes of header length, a JSON header of {name: {dtype, shape, data_offsets}}, then the data
(https://github.com/huggingface/safetensors). Nothing but headers is read here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from moesaic.core.errors import BadInput

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

METADATA = "__metadata__"
"""The one name in a header that is no tensor."""

LONGEST_HEADER = 100_000_000
"""Bytes; the format allows no more."""

DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "BOOL": torch.bool,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
}  # fmt: skip
"""Name in a header -> torch dtype."""


class Range(NamedTuple):
    """Bytes `start` to `start + nbytes` of a file: a tensor, or some of its rows."""

    path: Path
    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    name: str

    def rows(self, first: int, last: int) -> Range:
        """Rows `first` to `last` (of the outermost axis). Raises BadInput beyond the tensor."""
        if not self.shape or not 0 <= first <= last <= self.shape[0]:
            raise BadInput(f"{self.path}: tensor {self.name} {list(self.shape)} has no rows {first} to {last}")
        row = self.nbytes // max(1, self.shape[0])
        name = f"{self.name}[{first}]" if last == first + 1 else f"{self.name}[{first}:{last}]"
        return Range(
            self.path, self.start + first * row, (last - first) * row, self.dtype, (last - first, *self.shape[1:]), name
        )

    def piece(self, first: int, nbytes: int) -> Range:
        """So many bytes from byte `first` of the tensor on, as U8."""
        return Range(self.path, self.start + first, nbytes, torch.uint8, (nbytes,), self.name)


class Table(Mapping[str, Range]):
    """Tensors of a checkpoint by name, in the order of the files."""

    def __init__(self, tensors: dict[str, Range], files: list[Path]) -> None:
        self._tensors, self.files = tensors, files

    def __getitem__(self, name: str) -> Range:
        try:
            return self._tensors[name]
        except KeyError:
            raise BadInput(f"no tensor {name} in {', '.join(str(f) for f in self.files)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @classmethod
    def of_folder(cls, folder: str | Path) -> Table:
        """The table of a model folder: one file, or shards by index. Raises BadInput naming file and tensor."""
        folder = Path(folder)
        index = folder / INDEX
        if index.is_file():
            return _sharded(index)
        if (folder / SINGLE).is_file():
            return cls.of_files([folder / SINGLE])
        raise BadInput(f"{folder} has no weights that can be read by byte range: expected {SINGLE} or {INDEX}")

    @classmethod
    def of_files(cls, files: Iterable[str | Path]) -> Table:
        """The table of these safetensors files."""
        paths = [Path(file) for file in files]
        tensors: dict[str, Range] = {}
        for path in paths:
            tensors.update(read_header(path))
        return cls(tensors, paths)


def _sharded(index: Path) -> Table:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{index} is not a safetensors index ({error!r})") from error
    held: dict[str, dict[str, Range]] = {}
    for shard in shards:
        first = next(name for name, file in weight_map.items() if file == shard)
        if not isinstance(shard, str) or len(PurePosixPath(shard).parts) != 1 or "\\" in shard or shard in ("", ".", ".."):
            raise BadInput(f"{index} sends tensor {first} to {shard!r}, which is no file of this folder")
        path = index.parent / shard
        if not path.is_file():
            raise BadInput(f"{path} is missing: {index.name} expects tensor {first} in it")
        held[shard] = read_header(path)
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise BadInput(f"{index.parent / shard} has no tensor {name}, which {index.name} expects there")
    tensors = {name: tensor for shard in shards for name, tensor in held[shard].items()}
    return Table(tensors, [index.parent / shard for shard in shards])


def read_header(path: Path) -> dict[str, Range]:
    """The tensors of one safetensors file, each proven to lie inside the file and on top of no other.

    Raises BadInput naming the file, and the tensor, that does not.
    """
    header, base, size = _header(path)
    found = {name: _tensor(path, name, entry, base) for name, entry in header.items() if name != METADATA}
    end, before = base, ""
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start < end and tensor.nbytes:
            raise BadInput(f"{path} is corrupted: tensors {before} and {name} overlap at byte {tensor.start}")
        if tensor.start + tensor.nbytes > size:
            raise BadInput(f"{path} is truncated: tensor {name} ends at byte {tensor.start + tensor.nbytes} of {size}")
        if tensor.nbytes:
            end, before = tensor.start + tensor.nbytes, name
    return found


def read_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file, empty where it has none. Raises BadInput where it is not text by name."""
    found = _header(path)[0].get(METADATA, {})
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise BadInput(f"{path} is corrupted: its {METADATA} is not text by name")
    return found


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the data begins, and the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise BadInput(f"{path} is truncated or not safetensors: {size} bytes do not hold its header of {length}")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise BadInput(f"{path} is corrupted: its header is not JSON ({error}); download it again") from error
    if not isinstance(header, dict):
        raise BadInput(f"{path} is corrupted: its header is no JSON object; download it again")
    return header, 8 + length, size


def _tensor(path: Path, name: str, entry: Any, base: int) -> Range:
    try:
        kind, shape = entry["dtype"], tuple(entry["shape"])
        first, last = entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, first, last))
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is corrupted: tensor {name} has no valid entry ({error!r})") from error
    if not whole or last < first:
        raise BadInput(f"{path} is corrupted: tensor {name} claims bytes {first} to {last} for shape {list(shape)}")
    if kind not in DTYPES:
        raise BadInput(f"{path}: tensor {name} is stored as {kind}, which is not read here")
    if math.prod(shape) * DTYPES[kind].itemsize != last - first:
        raise BadInput(f"{path} is corrupted: tensor {name} has {last - first} bytes for {kind} {list(shape)}")
    return Range(path, base + first, last - first, DTYPES[kind], shape, name)
