"""Write a trace while it is made: one complete blob per flush, one ordinary safetensors file in the end."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.core.files import check_writable, replacing
from moesaic.trace import segments
from moesaic.trace.file import Header, Trace, open_trace
from moesaic.trace.join import BY_ROW, joined, runs_of, write_joined

FLUSH_TOKENS = 1 << 16
FLUSH_SECONDS = 2.0


def check_place(path: Path, may_exist: bool = False) -> None:
    """Raises BadInput where no trace can be written, or where one stands that would be lost."""
    check_writable(path)
    if path.exists() and not may_exist:
        raise BadInput(f"{path} exists: name another file, resume it, or say that it may be overwritten")


class Writer:
    """Takes rows in the order in which they are routed. `path` None keeps them in memory.

    The file appears with the first flush. Raises BadInput where it exists (unless `overwrite`) or cannot be written.
    """

    def __init__(self, header: Header, path: str | Path | None, *, overwrite: bool = False, resume: bool = False) -> None:
        self.header, self.path = header, None if path is None else Path(path).expanduser()
        self.tokens = self.flushed_tokens = 0
        self._parts: list[segments.Columns] = []
        self._waiting: list[segments.Columns] = []
        self._fresh: dict[int, tuple[int, int]] = {}
        self._domains: dict[str, int] = {name: i for i, name in enumerate(header.domains)}
        self._stream: Any = None
        self._flushed_at = time.monotonic()
        self.extra: dict[str, Any] = dict(header.extra)
        self.resumed: Trace | None = None
        if self.path is not None:
            self._check_place(overwrite, resume)

    def _check_place(self, overwrite: bool, resume: bool) -> None:
        assert self.path is not None
        check_place(self.path, overwrite or resume)
        if resume and self.path.exists():
            self._resume()

    def _resume(self) -> None:
        assert self.path is not None
        held = open_trace(self.path)
        if held.header.layers != self.header.layers or held.header.tokenizer != self.header.tokenizer:
            raise BadInput(f"{self.path} was recorded from another model or tokenizer: it cannot be resumed with this one")
        self.columns = set(held.columns) - {"sequences", "runs"}
        self.resumed = held
        self.tokens = self.flushed_tokens = len(held)
        self.extra = dict(held.header.extra)
        self._domains = {name: i for i, name in enumerate(held.domains)}
        if held.lost_bytes:
            with self.path.open("r+b") as stream:
                stream.truncate(self.path.stat().st_size - held.lost_bytes)

    def domain(self, name: str | None) -> int:
        """Number of a domain, -1 for none."""
        return -1 if name is None else self._domains.setdefault(name, len(self._domains))

    def begin(self, sequence: int, domain: int, stream: int) -> None:
        """A sequence of that number exists from now on."""
        self._fresh[sequence] = (domain, stream)

    def add(self, sequence_T: np.ndarray, step_T: np.ndarray, columns: segments.Columns) -> None:
        """Rows: their sequences, their forward passes, and the columns of `Trace` that are by row."""
        columns = {"sequence": sequence_T, "step": step_T, **columns}
        self._waiting.append(columns)
        self.tokens += len(sequence_T)

    @property
    def due(self) -> bool:
        waiting = self.tokens - self.flushed_tokens
        return waiting >= FLUSH_TOKENS or (waiting > 0 and time.monotonic() - self._flushed_at > FLUSH_SECONDS)

    def flush(self) -> None:
        """Make what was added safe from a kill."""
        self._flushed_at = time.monotonic()
        if not self._waiting:
            return
        rows = _together(self._waiting)
        self._waiting.clear()
        sequence_T, step_T = rows.pop("sequence"), rows.pop("step")
        order = np.lexsort((step_T, sequence_T))
        sorted_already = bool((order[1:] > order[:-1]).all())
        if not sorted_already:
            rows = _reordered(rows, order)
            sequence_T, step_T = sequence_T[order], step_T[order]
        rows["runs"] = runs_of(sequence_T, step_T)
        rows["written"] = np.array(list(self._fresh), np.int64)
        rows["sequences"] = np.array(list(self._fresh.values()), np.int32).reshape(-1, 2)
        self._fresh.clear()
        if self.path is None:
            self._parts.append(rows)
        else:
            segments.append(self._open(), rows, self._header().metadata())
        self.flushed_tokens += len(sequence_T)

    def _open(self) -> Any:
        assert self.path is not None
        if self._stream is None:
            try:
                self._stream = self.path.open("ab" if self.resumed is not None else "wb")
            except OSError as error:
                raise BadInput(f"cannot write {self.path}: {error.strerror or error}") from error
        return self._stream

    def _header(self) -> Header:
        return replace(self.header, domains=tuple(self._domains), extra=self.extra)

    def close(self) -> Trace | None:
        """Flush, and turn the blobs into one file; None where nothing was recorded (then there is no file)."""
        self.flush()
        header = self._header()
        if self.path is None:
            return Trace(header, joined(self._parts)) if self._parts else None
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        elif self.resumed is None:
            return None
        found, _ = segments.read(self.path)
        try:
            with replacing(self.path) as scratch:
                write_joined(scratch, [segment.columns for segment in found], header.metadata())
        except BadInput as error:
            raise BadInput(f"{error}; what was flushed can be read") from error
        return open_trace(self.path)


def _together(parts: list[segments.Columns]) -> segments.Columns:
    if len(parts) == 1:
        return dict(parts[0])
    rows: segments.Columns = {}
    for name in parts[0]:
        if name == "hidden_rows":
            shift = np.cumsum([0] + [len(part["sequence"]) for part in parts[:-1]])
            rows[name] = np.concatenate([part[name] + by for part, by in zip(parts, shift, strict=True)])
        else:
            rows[name] = np.concatenate([part[name] for part in parts])
    return rows


def _reordered(rows: segments.Columns, order: np.ndarray) -> segments.Columns:
    rows = {name: column[order] if name in BY_ROW else column for name, column in rows.items()}
    if "hidden_rows" in rows:
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        rows["hidden_rows"] = inverse[rows["hidden_rows"]]
    return rows
