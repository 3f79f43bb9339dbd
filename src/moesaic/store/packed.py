"""A packed checkpoint: every expert is one record, in the bytes of the slot that it is read into, on a multiple of 4096.

The folder holds config, tokenizer and all other tensors as any model folder does, and experts in files of their own,
`experts-00001-of-0000N.safetensors`: a U8 tensor per expert, first matrix and then second, padded to 4096 bytes. Their
`__metadata__` says what is in them; the same text in each file, so that files of two packings do not mix.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.core.errors import BadInput
from moesaic.store.table import DTYPES, Range, read_header, read_metadata

FORMAT, VERSION = "moesaic.packed", "1"

RECORD = 4096
"""Bytes: records begin on multiples of it and are padded to it, which is what direct reads want."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""torch dtype -> its name in a header."""

KEPT = (torch.bfloat16, torch.float16, torch.float32)
"""What experts are, or were before they were quantised."""

QUANTISED = (8, 4, 2)
"""Bits of a weight in a quantised record; other records hold the dtype itself."""

_FILE = re.compile(r"experts-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Block:
    """The experts of one MoE block.

    Attributes:
        name: of the experts module in the model. Its records are `{records}.{e}`: another block's where two share weights.
        dtype: of the model's matrices; `shapes`: of one expert's two, [inputs, outputs] each where `transposed`.
        shifts: where in a cache line the matrices of expert 0 begin in the model that was packed; the others follow.
        bits_E: of each expert's weights. `sizes[bits]`: bytes of its two matrices in a record.
    """

    name: str
    records: str
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    transposed: bool
    shifts: tuple[int, int]
    bits_E: tuple[int, ...]
    sizes: dict[int, tuple[int, int]]

    @property
    def as_records(self) -> bool:
        """Whether all its experts are quantised, alike or not, so that records are computed from as they lie."""
        return all(bits in QUANTISED for bits in self.bits_E)

    def record_bytes(self, e: int) -> int:
        """With padding."""
        return -(-sum(self.sizes[self.bits_E[e]]) // RECORD) * RECORD

    def row(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "name": self.name,
            "records": self.records,
            "dtype": NAMES[self.dtype],
            "shapes": self.shapes,
            "transposed": self.transposed,
            "shifts": self.shifts,
            "bits": self.bits_E,
            "sizes": {str(bits): size for bits, size in self.sizes.items()},
        }


@dataclass(frozen=True)
class Contents:
    """What a packing holds: `model` it was made of, and `group_size` of quantised weights (0: none)."""

    model: str
    group_size: int
    blocks: tuple[Block, ...]

    def records(self) -> Iterator[tuple[Block, int]]:
        """Every record in the order of the files."""
        for block in self.blocks:
            if block.records == block.name:
                yield from ((block, e) for e in range(len(block.bits_E)))

    def text(self) -> str:
        return json.dumps(
            {"model": self.model, "group_size": self.group_size, "blocks": [block.row() for block in self.blocks]}
        )


class Packed:
    """The records of a packed folder, all of them proven to be there and of the size that they should have."""

    def __init__(self, folder: Path, contents: Contents, records: dict[str, Range]) -> None:
        self.folder, self.contents, self._records = folder, contents, records

    def matrix(self, block: Block, e: int, which: int) -> Range:
        """The bytes of one matrix: in the block's dtype and shape where the expert is not quantised, else flat U8."""
        record, sizes = self._records[f"{block.records}.{e}"], block.sizes[block.bits_E[e]]
        whole = block.bits_E[e] not in QUANTISED
        dtype, shape = (block.dtype, block.shapes[which]) if whole else (torch.uint8, (sizes[which],))
        return Range(record.path, record.start + which * sizes[0], sizes[which], dtype, shape, record.name)


def expert_files(folder: Path) -> list[Path]:
    """Files of records in a folder; none where it is an ordinary model."""
    return sorted(path for path in folder.glob("experts-*.safetensors") if _FILE.fullmatch(path.name))


def read_packed(folder: str | Path) -> Packed | None:
    """The packed experts of a model folder; None where it has none. Raises BadInput naming file and tensor."""
    folder = Path(folder)
    files = expert_files(folder)
    if not files:
        return None
    count = int(_FILE.fullmatch(files[0].name)[2])  # type: ignore[index]
    for number in range(1, count + 1):
        path = folder / file_name(number, count)
        if path not in files:
            raise BadInput(f"{path} is missing: {files[0].name} is one of {count} files of experts")
    if len(files) != count:
        other = next(path for path in files if int(_FILE.fullmatch(path.name)[2]) != count)  # type: ignore[index]
        raise BadInput(f"{other} is of another packing than {files[0].name}: pack the model again")
    texts = [_text(path) for path in files]
    contents = _contents(files[0], texts[0])
    found: dict[str, Range] = {}
    for path, text in zip(files, texts, strict=True):
        if text != texts[0]:
            raise BadInput(f"{path} is of another packing than {files[0].name}: pack the model again")
        found.update(read_header(path))
    records = {f"{block.records}.{e}": block.record_bytes(e) for block, e in contents.records()}
    for name, size in records.items():
        if name not in found:
            raise BadInput(f"{folder}: no file of experts has the record {name}; pack the model again")
        record = found[name]
        if record.dtype != torch.uint8 or record.nbytes != size:
            raise BadInput(
                f"{record.path}: record {name} has {record.nbytes} bytes of {NAMES[record.dtype]}, and should have {size} of U8"
            )
        if record.start % RECORD:
            raise BadInput(f"{record.path}: record {name} begins at byte {record.start}, which is no multiple of {RECORD}")
    for name in found.keys() - records.keys():
        raise BadInput(f"{found[name].path}: {name} is no record of this packing; pack the model again")
    return Packed(folder, contents, found)


def file_name(number: int, count: int) -> str:
    return f"experts-{number:05}-of-{count:05}.safetensors"


def _text(path: Path) -> str:
    metadata = read_metadata(path)
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise BadInput(
            f"{path} is no file of experts that can be read here: format {metadata.get('format')!r}, version "
            f"{metadata.get('version')!r}; expected {FORMAT} {VERSION}"
        )
    return metadata.get("contents", "")


def _contents(path: Path, text: str) -> Contents:
    try:
        row = json.loads(text)
        blocks = tuple(_block(path, entry) for entry in row["blocks"])
        made = Contents(str(row["model"]), int(row["group_size"]), blocks)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is corrupted: its contents cannot be read ({error!r}); pack the model again") from error
    by_name = {block.name: block for block in blocks}
    for block in blocks:
        owner = by_name.get(block.records)
        if owner is None or owner.records != owner.name or (owner.bits_E, owner.sizes) != (block.bits_E, block.sizes):
            raise BadInput(f"{path} is corrupted: {block.name} shares the records of {block.records}, which do not fit it")
    return made


def _block(path: Path, row: dict[str, Any]) -> Block:
    dtype = DTYPES.get(row["dtype"])
    first, second = (tuple(shape) for shape in row["shapes"])
    gate_up_shift, down_shift = row["shifts"]
    sizes = {int(bits): (int(pair[0]), int(pair[1])) for bits, pair in row["sizes"].items()}
    block = Block(
        name=row["name"],
        records=row["records"],
        dtype=dtype or torch.uint8,
        shapes=(first, second),
        transposed=bool(row["transposed"]),
        shifts=(gate_up_shift, down_shift),
        bits_E=tuple(row["bits"]),
        sizes=sizes,
    )
    if dtype not in KEPT:
        raise BadInput(f"{path} is corrupted: {block.name} is of dtype {row['dtype']!r}")
    whole = dtype.itemsize * 8
    numbers = (*first, *second, *block.shifts, *block.bits_E, *(n for pair in sizes.values() for n in pair))
    if not all(type(n) is int and n >= 0 for n in numbers) or len(first) != 2 or len(second) != 2 or not block.bits_E:
        raise BadInput(f"{path} is corrupted: {block.name} has shapes {row['shapes']}, shifts {row['shifts']}, sizes {sizes}")
    for bits in sorted(set(block.bits_E)):
        if bits not in (whole, *QUANTISED) or bits not in sizes:
            raise BadInput(f"{path}: {block.name} has experts of {bits} bits; {row['dtype']} experts have {whole}, 8, 4 or 2")
    plain = tuple(math.prod(shape) * dtype.itemsize for shape in block.shapes)
    if sizes.get(whole, plain) != plain:
        raise BadInput(f"{path} is corrupted: {block.name} has {sizes[whole]} bytes for matrices {row['shapes']}, not {plain}")
    return block
