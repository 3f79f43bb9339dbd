"""Pack a checkpoint: experts as records that stream with one read each, all other tensors as they were.

The checkpoint is read by byte range, some experts at a time, whatever its size. The packing grows beside OUT and gets its
name when it is whole (store/record_writer.py).
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesaic.core.errors import BadInput
from moesaic.core.sizes import show_bytes
from moesaic.kernels.low_bits import Packing, quantize_matrix, record_bytes
from moesaic.serving.streamed.bits import Bits
from moesaic.store import Range, Reader, Table
from moesaic.store.packed import QUANTISED, RECORD, Block, Contents
from moesaic.store.record_writer import Place, RecordWriter
from moesaic.store.writing import MOST_BYTES, copy_tensors, settle
from moesaic.view import View, resolve_model
from moesaic.view.discover import expert_parameters
from moesaic.view.skeleton import Survey, survey
from moesaic.view.skeleton.fetch import Fetch, fetch
from moesaic.view.skeleton.packed_sources import PackedSource, Sourced

AHEAD_BYTES = 64 << 20
"""Experts being read while one is written; at least two."""

SPARE_BYTES = 64 << 20
"""Room on the disk for what is not weights."""

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
"""Endings of files that are not taken over as they are."""

FOLDERS = ("additional_chat_templates",)
"""Folders that are."""


@dataclass(frozen=True)
class Plan:
    """What a packing will be: nothing is written yet.

    Attributes:
        expert_bytes, other_bytes: of the packing; `bytes_before`: of all tensors in the checkpoint.
        files: that go along as they are.
    """

    folder: Path
    contents: Contents
    sources: dict[str, tuple[Sourced, Sourced]]
    others: list[Range]
    files: list[Path]
    expert_bytes: int
    other_bytes: int
    bytes_before: int

    @property
    def bytes_after(self) -> int:
        return self.expert_bytes + self.other_bytes

    @property
    def lossless(self) -> bool:
        return not any(bits in QUANTISED for block in self.contents.blocks for bits in block.bits_E)


def plan_packing(path_or_id: str | Path, bits: Bits | None = None, group_size: int = 64, **how: Any) -> Plan:
    """What packing a checkpoint would write. `how`: see `moesaic.load`.

    Raises BadInput for a checkpoint that cannot be streamed, or bits that do not fit its experts.
    """
    found = survey(path_or_id, **how)
    source = resolve_model(path_or_id)
    table: Table = found.table
    folder = table.files[0].parent
    if any(isinstance(each, PackedSource) for each in found.sources.values()):
        raise BadInput(f"{folder} is packed already: pack the checkpoint that it was made of")
    blocks, sources = _blocks(found, bits or Bits(), group_size)
    quantised = any(width in QUANTISED for block in blocks for width in block.bits_E)
    contents = Contents(
        str(path_or_id) if isinstance(source, str) else folder.resolve().name, group_size * quantised, tuple(blocks)
    )
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.endswith(WEIGHTS)]
    return Plan(
        folder, contents, sources, found.others, files,
        expert_bytes=sum(block.record_bytes(e) for block, e in contents.records()),
        other_bytes=sum(tensor.nbytes for tensor in found.others),
        bytes_before=table.nbytes,
    )  # fmt: skip


def _blocks(found: Survey, bits: Bits, group_size: int) -> tuple[list[Block], dict[str, tuple[Sourced, Sourced]]]:
    view, own = View(found.model), found.model.state_dict()
    names = {place: name for name, place in expert_parameters(found.model).items()}
    blocks: list[Block] = []
    sources: dict[str, tuple[Sourced, Sourced]] = {}
    first_of: dict[int, str] = {}  # blocks that share weights share records
    for i, block in enumerate(view):
        pair = found.sources[names[i, 0]], found.sources[names[i, 1]]
        name, dtype = names[i, 0].rpartition(".")[0], own[names[i, 0]].dtype
        shapes = pair[0].shape, pair[1].shape
        transposed = block.bank.transposed
        whole = dtype.itemsize * 8
        sizes = {whole: tuple(shape[0] * shape[1] * dtype.itemsize for shape in shapes)}
        upright = [shape[::-1] if transposed else shape for shape in shapes]
        chosen = bits.of(name, i, block.num_experts, whole)
        for width in sorted(set(chosen) - {whole}):
            try:
                sizes[width] = tuple(record_bytes(Packing(width, group_size), (s[0], s[1])) for s in upright)
            except BadInput as error:
                raise BadInput(f"{name}: {error}") from error
        blocks.append(
            Block(
                name=name,
                records=first_of.setdefault(id(pair[0]), name),
                dtype=dtype,
                shapes=shapes,
                transposed=transposed,
                shifts=(pair[0].shift(0, dtype), pair[1].shift(0, dtype)),
                bits_E=chosen,
                sizes=sizes,
            )
        )
        sources[name] = pair
    bits.check_used()
    return blocks, sources


def pack(
    path_or_id: str | Path,
    out: str | Path,
    *,
    bits: Bits | None = None,
    group_size: int = 64,
    resume: bool = False,
    threads: int = 4,
    progress: Callable[[int, int], None] = lambda done, total: None,
    most_file_bytes: int = MOST_BYTES,
    **how: Any,
) -> Plan:
    """Write a packed copy of a checkpoint to `out`, which must not be there or be empty.

    Args:
        bits: of each expert; None keeps experts as they are, which loses nothing.
        group_size: weights of a quantised expert that share a scale.
        resume: go on with a packing to the same `out` that was broken off.
        progress: called with bytes written and bytes in all.
        how: see `moesaic.load`.

    Raises BadInput naming what does not fit, what the system refused to write, or a weight that is not finite; ReadFailed.
    """
    out = Path(out)
    plan = plan_packing(path_or_id, bits, group_size, **how)
    _check_out(out, plan.folder)
    partial = out.with_name(out.name + ".partial")
    made_of = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in Table.of_folder(plan.folder).files]
    out.parent.mkdir(parents=True, exist_ok=True)
    _check_room(plan, partial)
    done = 0

    def step(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, plan.bytes_after)

    try:
        with (
            Reader("drop", threads) as reader,
            RecordWriter(partial, plan.contents, made_of, resume, most_file_bytes) as writer,
        ):
            step(sum(place.nbytes for place in writer.places[: writer.done]))
            _write_experts(plan, reader, writer, step)
            copy_tensors(plan.others, partial, reader, most_file_bytes, step)
            for path in plan.files:  # config.json among them: what has none is no model
                shutil.copyfile(path, partial / path.name)
            for name in FOLDERS:
                if (plan.folder / name).is_dir():
                    shutil.copytree(plan.folder / name, partial / name, dirs_exist_ok=True)
            writer.finish()
        settle(partial)
        os.replace(partial, out)
        settle(out.parent)
    except OSError as error:
        raise BadInput(
            f"cannot write {partial}: {error.strerror or error}; what is done lies there: go on with --resume, or delete it"
        ) from error
    return plan


def _write_experts(plan: Plan, reader: Reader, writer: RecordWriter, step: Callable[[int], None]) -> None:
    """Read some experts ahead, and write them in order."""
    coming: deque[tuple[Place, torch.Tensor, Fetch]] = deque()
    spare: dict[int, list[torch.Tensor]] = {}  # rooms are used again: fresh ones of such sizes leave holes in the heap
    left, ahead = deque(writer.left), 0
    while left or coming:
        while left and (len(coming) < 2 or ahead < AHEAD_BYTES):
            place = left.popleft()
            block = place.block
            size = -(-sum(block.sizes[_whole(block)]) // RECORD) * RECORD
            free = spare.setdefault(size, [])
            room = free.pop() if free else torch.zeros(size, dtype=torch.uint8)
            pair = plan.sources[block.name]
            coming.append((place, room, fetch(reader, place.e, list(zip(pair, _matrices(block, room), strict=True)))))
            ahead += room.nbytes
        place, room, fetched = coming.popleft()
        ahead -= room.nbytes
        fetched.wait()
        writer.append(_record(place, room, plan.contents.group_size))
        step(place.nbytes)
        spare[room.nbytes].append(room)


def _whole(block: Block) -> int:
    return block.dtype.itemsize * 8


def _matrices(block: Block, room: torch.Tensor) -> list[torch.Tensor]:
    first, second = block.sizes[_whole(block)]
    pieces = room[:first], room[first : first + second]
    return [piece.view(block.dtype).view(shape) for piece, shape in zip(pieces, block.shapes, strict=True)]


def _record(place: Place, room: torch.Tensor, group_size: int) -> np.ndarray:
    """The bytes of a record, from the expert's matrices as the model has them."""
    block, e = place.block, place.e
    bits = block.bits_E[e]
    if bits not in QUANTISED:
        return room.numpy()
    record, at = np.zeros(place.nbytes, np.uint8), 0
    for matrix, size in zip(_matrices(block, room), block.sizes[bits], strict=True):
        try:
            made = quantize_matrix(matrix.T if block.transposed else matrix, Packing(bits, group_size))
        except BadInput as error:
            raise BadInput(f"{place.name}: {error}") from error
        record[at : at + size] = made.numpy()
        at += size
    return record


def _check_out(out: Path, folder: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise BadInput(f"{out} is there and is no folder: name one that is not there yet")
    if out.is_dir() and any(out.iterdir()):
        raise BadInput(f"{out} is not empty: name a folder that is not there yet, or delete it")
    if out.resolve().is_relative_to(folder.resolve()):
        raise BadInput(f"{out} lies inside the model {folder}: name a folder beside it")


def _check_room(plan: Plan, partial: Path) -> None:
    there = sum(path.stat().st_size for path in partial.iterdir()) if partial.is_dir() else 0
    needed, free = plan.bytes_after + SPARE_BYTES - there, shutil.disk_usage(partial.parent).free
    if needed > free:
        raise BadInput(f"{partial.parent} has {show_bytes(free)} free, the packing takes {show_bytes(needed)}: make room")
