"""The folder that a surgery writes: a shard per block, one for the rest, an index; beside OUT until it is whole.

A shard that is there is whole, because it was renamed when it was; so a surgery that was broken off goes on behind the last
one. `made.json` says of which input and steps they are.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.files import replacing, write_atomically
from moesaic.core.sizes import show_bytes
from moesaic.store import Reader
from moesaic.store.slots import LINE
from moesaic.store.table import INDEX, read_header
from moesaic.store.writing import PIECE, header, settle
from moesaic.surgery.parts import Lazy, Part, get

MADE = "made.json"
SPARE_BYTES = 64 << 20

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
"""Endings of files of the input that are not taken over as they are."""


class Shards:
    """`out` as it grows in `out.partial`. `made_of`: what must be equal for a broken-off surgery to be gone on with."""

    def __init__(self, out: Path, source: Path, made_of: Any, count: int, resume: bool) -> None:
        self.out, self.source, self.count = out, source, count
        self.partial = out.with_name(out.name + ".partial")
        note = json.dumps(made_of, sort_keys=True, default=str)
        if self.partial.exists():
            held = self.partial / MADE
            if not resume:
                raise BadInput(f"{self.partial} is of a surgery that was broken off: pass --resume, or delete it")
            if not held.is_file() or held.read_text() != note:
                raise BadInput(f"{self.partial} was begun from another model or with other steps: delete it")
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"cannot write {self.partial}: {error.strerror}") from error
        write_atomically(self.partial / MADE, note)

    def path(self, number: int) -> Path:
        """Of shard `number`, from 0."""
        return self.partial / f"model-{number + 1:05}-of-{self.count:05}.safetensors"

    def done(self, number: int) -> bool:
        return self.path(number).is_file()

    def copy(self, number: int, tensors: Sequence[tuple[str, Part | Tensor]], reader: Reader) -> None:
        """A shard of tensors under these names, those on disk as they are stored, those to be made one at a time."""
        head = header(((name, each.dtype, each.shape) for name, each in tensors), {"format": "pt"}, LINE)
        with replacing(self.path(number)) as scratch, scratch.open("wb") as stream:
            stream.write(head)
            for _, each in tensors:
                if isinstance(each, Lazy):
                    each = get(each, reader)
                if isinstance(each, Tensor):
                    stream.write(each.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                    continue
                for first in range(0, each.nbytes, PIECE):
                    stream.write(reader.read(each.piece(first, min(PIECE, each.nbytes - first))).numpy().data)

    def write(self, number: int, tensors: Sequence[tuple[str, Tensor]], notes: dict[str, Any], reader: Reader) -> None:
        """One shard; `notes` lie beside it, for `notes()`. Raises BadInput for what the system refuses."""
        write_atomically(self.path(number).with_suffix(".json"), json.dumps(notes))
        self.copy(number, tensors, reader)

    def notes(self, number: int) -> dict[str, Any]:
        return json.loads(self.path(number).with_suffix(".json").read_text())

    def index(self) -> int:
        """Write the index; bytes of all tensors."""
        weight_map: dict[str, str] = {}
        size = 0
        for number in range(self.count):
            found = read_header(self.path(number))
            weight_map |= dict.fromkeys(found, self.path(number).name)
            size += sum(tensor.nbytes for tensor in found.values())
        write_atomically(self.partial / INDEX, json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
        return size

    def finish(self) -> Path:
        """Give the folder its name."""
        for path in [self.partial / MADE, *(self.path(number).with_suffix(".json") for number in range(self.count))]:
            path.unlink(missing_ok=True)
        settle(self.partial)
        if self.out.is_dir():
            self.out.rmdir()  # empty: `check_out` saw to it
        os.replace(self.partial, self.out)
        settle(self.out.parent)
        return self.out


def check_out(out: Path, source: Path, needed: int = 0) -> None:
    """Raises BadInput where OUT holds something, lies in the model, or the disk has no room for `needed` bytes."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise BadInput(f"{out} is there and is no folder: name one that is not there yet")
    if out.is_dir() and any(out.iterdir()):
        raise BadInput(f"{out} is not empty: name a folder that is not there yet, or delete it")
    if out.resolve() == source.resolve() or out.resolve().is_relative_to(source.resolve()):
        raise BadInput(f"{out} lies inside the model {source}: name a folder beside it")
    place = next(parent for parent in out.resolve().parents if parent.is_dir())
    if not os.access(place, os.W_OK):
        raise BadInput(f"cannot write {out}: no permission to write in {place}")
    free = shutil.disk_usage(place).free
    if needed and needed + SPARE_BYTES > free:
        raise BadInput(f"{place} has {show_bytes(free)} free, {out.name} takes {show_bytes(needed)}: make room")


def copy_files(source: Path, target: Path, leave: Iterable[str] = ()) -> None:
    """What a model folder holds beside its weights: tokenizer, templates, generation settings."""
    for path in sorted(source.iterdir()):
        if path.name in leave or path.name.endswith(WEIGHTS):
            continue
        if path.is_file():
            shutil.copyfile(path, target / path.name)
        elif path.name == "additional_chat_templates":
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
