"""The files of experts of a packing under way: records one after another, a checksum of each, and where to go on.

A packing grows in `OUT.partial`, which no loader takes for a model: its config.json comes last. Beside the files lie what is
being made of what (`packing.json`) and a line per whole record (`packing.log`); both are gone before the folder gets its name.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from moesaic.core.errors import BadInput
from moesaic.core.files import write_atomically
from moesaic.store.packed import FORMAT, RECORD, VERSION, Block, Contents, file_name
from moesaic.store.writing import MOST_BYTES, header

PLAN, LOG = "packing.json", "packing.log"


class Place(NamedTuple):
    """Where a record goes."""

    block: Block
    e: int
    file: int
    start: int

    @property
    def name(self) -> str:
        return f"{self.block.name}.{self.e}"

    @property
    def nbytes(self) -> int:
        return self.block.record_bytes(self.e)


class RecordWriter:
    """Appends records in order. `left` are those still to be written; with `resume`, only what follows the last good one."""

    def __init__(self, folder: Path, contents: Contents, made_of: Any, resume: bool = False, most: int = MOST_BYTES) -> None:
        self.folder = folder
        self._heads, self.places = _layout(contents, most)
        self.paths = [folder / file_name(i + 1, len(self._heads)) for i in range(len(self._heads))]
        self._stream: IO[bytes] | None = None
        self._log: IO[str] | None = None
        plan = json.dumps({"made_of": made_of, "contents": contents.text(), "most_bytes": most})
        if resume and folder.is_dir():
            self._check_plan(plan)
            self.done = self._good()
        else:
            self.done = 0
            try:
                folder.mkdir()
            except FileExistsError:
                raise BadInput(
                    f"{folder} is there from a packing that was broken off: go on with --resume, or delete it"
                ) from None
            except OSError as error:
                raise BadInput(f"cannot write {folder}: {error.strerror or error}") from error
            write_atomically(folder / PLAN, plan)
        self._cut()

    @property
    def left(self) -> list[Place]:
        return self.places[self.done :]

    def append(self, record: np.ndarray) -> None:
        """Write the next record, with its padding. Raises OSError."""
        place = self.places[self.done]
        assert record.nbytes == place.nbytes, place.name
        if self._stream is None:
            self._open(place)
        assert self._stream is not None and self._log is not None
        self._stream.write(record.data)
        self._log.write(_line(place, record))
        self.done += 1
        if self.done == len(self.places) or self.places[self.done].file != place.file:
            self._close()

    def finish(self) -> None:
        """All records are written: leave nothing but them."""
        assert not self.left
        (self.folder / LOG).unlink(missing_ok=True)
        (self.folder / PLAN).unlink(missing_ok=True)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._close()
        except OSError:
            if error is None:
                raise

    def _open(self, place: Place) -> None:
        path = self.paths[place.file]
        self._log = (self.folder / LOG).open("a", encoding="ascii", buffering=1)
        self._stream = path.open("ab")
        if self._stream.tell() == 0:
            self._stream.write(self._heads[place.file])

    def _close(self) -> None:
        stream, log, self._stream, self._log = self._stream, self._log, None, None
        try:
            if stream is not None:
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            for each in (stream, log):
                if each is not None:
                    each.close()

    def _check_plan(self, plan: str) -> None:
        path = self.folder / PLAN
        try:
            same = path.read_text(encoding="utf-8") == plan
        except (OSError, ValueError):
            same = False
        if not same:
            raise BadInput(
                f"{self.folder} was begun from another model, or with other options: give the same ones, or delete it"
            )

    def _good(self) -> int:
        """How many records, from the first on, are there with the bytes that were written."""
        try:
            lines = (self.folder / LOG).read_text(encoding="ascii").splitlines(keepends=True)
        except (OSError, ValueError):
            return 0
        good = 0
        for number, path in enumerate(self.paths):
            mine = [place for place in self.places if place.file == number]
            try:
                with path.open("rb") as stream:
                    if stream.read(len(self._heads[number])) != self._heads[number]:
                        return good
                    for place, line in zip(mine, lines[good:], strict=False):
                        data = np.frombuffer(stream.read(place.nbytes), np.uint8)
                        if data.nbytes != place.nbytes or line != _line(place, data):
                            return good
                        good += 1
            except OSError:
                return good
            if good < len(self.places) and self.places[good].file == number:
                return good
        return good

    def _cut(self) -> None:
        """Take away what follows the last good record."""
        log = self.folder / LOG
        lines = log.read_text(encoding="ascii").splitlines(keepends=True)[: self.done] if self.done else []
        write_atomically(log, "".join(lines))
        ends = {place.file: place.start + place.nbytes for place in self.places[: self.done]}
        for number, path in enumerate(self.paths):
            if number in ends:
                os.truncate(path, ends[number])
            else:
                path.unlink(missing_ok=True)


def _line(place: Place, record: np.ndarray) -> str:
    return f"{zlib.crc32(record.data):08x} {place.name}\n"


def _layout(contents: Contents, most: int) -> tuple[list[bytes], list[Place]]:
    """The header of each file, and the place of each record."""
    files: list[list[tuple[Block, int]]] = []
    size = 0
    for block, e in contents.records():
        if not files or size + block.record_bytes(e) > most:
            files.append([])
            size = 0
        files[-1].append((block, e))
        size += block.record_bytes(e)
    metadata = {"format": FORMAT, "version": VERSION, "contents": contents.text()}
    heads, places = [], []
    for number, mine in enumerate(files):
        entries = [(f"{block.name}.{e}", torch.uint8, (block.record_bytes(e),)) for block, e in mine]
        head = header(entries, metadata, RECORD)
        heads.append(head)
        at = len(head)
        for block, e in mine:
            places.append(Place(block, e, number, at))
            at += block.record_bytes(e)
    return heads, places
