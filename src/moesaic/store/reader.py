"""Byte ranges of files into memory: several reads in flight, demand before prefetch, and never a silent short read.

Who owns the page cache is a choice. `direct` goes past it (O_DIRECT, aligned, through a small buffer), so that only our
own cache holds weights; `keep` lets the kernel cache what is read, right when memory is free; `drop` reads through it and
asks the kernel to forget. Where a file system knows no O_DIRECT, `direct` becomes `drop`, and `page_cache` says so.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from moesaic.core.errors import BadInput, MoesaicError
from moesaic.store.slots import LINE
from moesaic.store.table import Range

PageCache = Literal["direct", "keep", "drop"]

ALIGNMENT = 4096
"""Bytes of which O_DIRECT wants offset, length and address to be multiples; covers every block size in use."""

CHUNK = 4 << 20
"""Bytes of one read: long enough for full bandwidth, short enough for several threads to share one matrix."""

DEMAND, PREFETCH = 0, 1


class ReadFailed(MoesaicError):
    """A read that failed, came up short or never returned; names file, offset and tensor."""


@dataclass
class Counters:
    """What a reader did: bytes asked for and delivered, reads issued, and seconds its threads spent in them."""

    bytes: int = 0
    reads: int = 0
    seconds: float = 0.0


@dataclass
class _Job:
    """One read of at most CHUNK bytes, which may fill several targets one after another."""

    ticket: Ticket
    source: Range
    start: int
    targets: list[np.ndarray]
    state: str = "waiting"
    busy: bool = False
    """A thread has it in hand, and may write to its targets though nobody wants it any more."""
    read: int = 0
    """Bytes of the targets it let go."""

    @property
    def nbytes(self) -> int:
        return self.read + sum(target.nbytes for target in self.targets)

    def let_go(self) -> None:
        """Of the targets' memory: jobs and tickets know each other, so the collector would come for it much later."""
        self.read, self.targets = self.nbytes, []


class Ticket:
    """Some ranges on their way into memory. `wait` before they are looked at."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._jobs: list[_Job] = []
        self._left = 0
        self._error: ReadFailed | None = None
        self._urgent = True

    @property
    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._left == 0 or self._error is not None

    def wait(self) -> float:
        """Seconds waited until all bytes are there. Raises ReadFailed."""
        return self._reader._wait(self)

    def hurry(self) -> None:
        """A prefetch is wanted now: its reads go before every other prefetch."""
        self._reader._hurry(self)

    def cancel(self) -> None:
        """Take back what has not begun, and return when nothing more will be written (at most a chunk per thread)."""
        self._reader._cancel(self)

    def drop(self) -> None:
        """`cancel` without waiting: the memory may be written to until `idle`."""
        self._reader._drop(self)

    @property
    def idle(self) -> bool:
        """Whether no thread has a read of it in hand."""
        return not any(job.busy for job in self._jobs)

    @property
    def moved_bytes(self) -> int:
        """Bytes of it that were read, or are being read."""
        return sum(job.nbytes for job in self._jobs if job.busy or job.state in ("done", "dropped"))


class Reader:
    """Reads ranges with `threads` reads in flight; a read that takes longer than `timeout` seconds is an error.

    `read_at(fd, buffers, offset)` is `os.preadv`, or a test's stand-in. Close it, or use it in a `with` block.
    """

    def __init__(
        self,
        page_cache: PageCache = "direct",
        threads: int = 4,
        timeout: float = 60.0,
        read_at: Callable[[int, Sequence[Any], int], int] | None = None,
    ) -> None:
        if page_cache not in get_args(PageCache):
            raise BadInput(f"page cache {page_cache!r}: one of {', '.join(get_args(PageCache))}")
        if threads < 1 or not timeout > 0:
            raise BadInput(f"a reader of {threads} threads and {timeout} s: give at least 1, and more than 0 s")
        self.page_cache: PageCache = page_cache
        self.threads, self.timeout = threads, timeout
        self.counters = Counters()
        self._read_at = read_at or getattr(os, "preadv", None) or _pread_into
        self._files: dict[Path, int] = {}
        self._stale: list[int] = []
        self._queue: list[tuple[int, int, _Job]] = []
        self._numbers = itertools.count()
        self._change = threading.Condition()
        self._workers: list[threading.Thread] = []
        self._closed = False

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and close the files. Reads under way end first, unless they hang."""
        with self._change:
            self._closed = True
            self._queue.clear()
            self._change.notify_all()
        hung = False
        for worker in self._workers:
            worker.join(1.0)
            hung = hung or worker.is_alive()
        if not hung:  # a file that a hung read still uses must not be closed under it
            for fd in (*self._files.values(), *self._stale):
                os.close(fd)
        self._files.clear()
        self._stale.clear()

    def fetch(self, pieces: Iterable[tuple[Range, Tensor]], prefetch: bool = False) -> Ticket:
        """Begin to read each range into its tensor: contiguous, of as many bytes, in the stored dtype.

        Ranges that follow one another on disk are read together. The tensors must not be used before `wait` of the ticket
        returned.
        """
        ticket = Ticket(self)
        ticket._urgent = not prefetch
        for source, tensor in sorted(pieces, key=lambda piece: (piece[0].path, piece[0].start)):
            target = _bytes_of(tensor)
            if target.nbytes != source.nbytes:
                raise BadInput(f"{source.name}: {source.nbytes} bytes do not fit a tensor of {target.nbytes}")
            at = 0
            while at < source.nbytes:
                last, start = ticket._jobs[-1] if ticket._jobs else None, source.start + at
                if last is None or last.nbytes == CHUNK or (last.source.path, last.start + last.nbytes) != (source.path, start):
                    ticket._jobs.append(last := _Job(ticket, source, start, []))
                part = target[at : at + CHUNK - last.nbytes]
                last.targets.append(part)
                at += part.nbytes
        with self._change:
            if self._closed:
                raise ReadFailed("the reader is closed")
            ticket._left = len(ticket._jobs)
            for job in ticket._jobs:
                heapq.heappush(self._queue, (PREFETCH if prefetch else DEMAND, next(self._numbers), job))
            if ticket._jobs and len(self._workers) < self.threads:
                self._start()
            self._change.notify_all()
        return ticket

    def read(self, source: Range) -> Tensor:
        """A range as a tensor of its own, which begins where in a cache line the range does: as if the file were mapped."""
        item, size = source.dtype.itemsize, source.nbytes
        room = torch.empty(size + 2 * LINE, dtype=torch.uint8)
        first = (source.start // item * item - room.data_ptr()) % LINE
        made = room[first : first + size].view(source.dtype).view(source.shape)
        self.fetch([(source, made)]).wait()
        return made

    def forget(self) -> None:
        """Drop all reads that have not begun: whoever asked for them no longer wants them."""
        with self._change:
            dropped, self._queue = self._queue, []
            for _, _, job in dropped:
                self._fail(job.ticket, "cancelled")

    def _start(self) -> None:
        for _ in range(self.threads):
            worker = threading.Thread(target=self._work, name="moesaic-read", daemon=True)
            self._workers.append(worker)
            worker.start()

    def _wait(self, ticket: Ticket) -> float:
        began = time.perf_counter()
        with self._change:
            seen, still = self.counters.reads, began
            while not ticket.done:
                self._change.wait(min(1.0, self.timeout))
                now = time.perf_counter()
                if self.counters.reads != seen:  # others' reads go first: the device is alive
                    seen, still = self.counters.reads, now
                elif now - still > self.timeout and not ticket.done:
                    job = next(job for job in ticket._jobs if job.state in ("waiting", "reading"))
                    self._fail(ticket, f"{_where(job)}: no answer for {self.timeout:g} s")
            if ticket._error is not None:
                raise ticket._error
        return time.perf_counter() - began

    def _hurry(self, ticket: Ticket) -> None:
        with self._change:
            if not ticket._urgent:
                ticket._urgent = True
                self._queue = [(DEMAND if job.ticket is ticket else rank, n, job) for rank, n, job in self._queue]
                heapq.heapify(self._queue)

    def _cancel(self, ticket: Ticket) -> None:
        with self._change:
            self._queue = [item for item in self._queue if item[2].ticket is not ticket]
            heapq.heapify(self._queue)
            while any(job.state in ("reading", "copying") for job in ticket._jobs):
                self._change.wait(0.05)
            self._fail(ticket, "cancelled")

    def _drop(self, ticket: Ticket) -> None:
        with self._change:
            self._queue = [item for item in self._queue if item[2].ticket is not ticket]
            heapq.heapify(self._queue)
            if not ticket.done:
                self._fail(ticket, "cancelled")

    def _fail(self, ticket: Ticket, why: str) -> None:
        if ticket._error is None:
            ticket._error = ReadFailed(why)
        for job in ticket._jobs:
            if job.state in ("waiting", "reading"):
                job.state = "abandoned"
        self._change.notify_all()

    def _work(self) -> None:
        buffer = np.frombuffer(mmap.mmap(-1, CHUNK + 2 * ALIGNMENT), np.uint8) if self.page_cache == "direct" else None
        while True:
            with self._change:
                while not self._queue and not self._closed:
                    self._change.wait()
                if self._closed:
                    return
                job = heapq.heappop(self._queue)[2]
                if job.state == "abandoned":
                    continue
                job.state, job.busy = "reading", True
            began = time.perf_counter()
            try:
                self._read(job, buffer)
                why = None
            except OSError as error:
                why = f"{_where(job)}: {error.strerror or error}"
            except ReadFailed as error:
                why = str(error)
            with self._change:
                self.counters.seconds += time.perf_counter() - began
                self.counters.reads += 1
                job.busy = False
                if why is not None:
                    self._leave(job.source.path)
                    self._fail(job.ticket, why)
                elif job.state in ("reading", "copying"):
                    job.state = "done"
                    self.counters.bytes += job.nbytes
                    job.ticket._left -= 1
                else:
                    job.state = "dropped"
                job.let_go()
                if job.ticket.done:
                    self._change.notify_all()
            del job  # this thread waits, perhaps for long

    def _read(self, job: _Job, buffer: np.ndarray | None) -> None:
        fd, size = self._open(job.source.path), job.nbytes
        if buffer is None or self.page_cache != "direct" or _in_place(job):
            self._fill(job, fd, job.targets, job.start, size)
            if self.page_cache == "drop" and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, job.start, size, os.POSIX_FADV_DONTNEED)
            return
        skip = job.start % ALIGNMENT
        room = -(-(skip + size) // ALIGNMENT) * ALIGNMENT
        self._fill(job, fd, [buffer[:room]], job.start - skip, skip + size)
        with self._change:
            if job.state == "abandoned":  # whoever gave up may have given the memory to somebody else
                return
            job.state = "copying"
        at = skip
        for target in job.targets:
            target[:] = buffer[at : at + target.nbytes]
            at += target.nbytes

    def _fill(self, job: _Job, fd: int, rooms: list[np.ndarray], offset: int, needed: int) -> None:
        done = 0
        while done < needed:
            got = self._read_at(fd, [room.data for room in rooms], offset + done)
            if got <= 0:
                raise ReadFailed(f"{_where(job)}: the file ends {needed - done} bytes early; it was cut short or replaced")
            done += got
            while rooms and got >= rooms[0].nbytes:
                got -= rooms[0].nbytes
                rooms = rooms[1:]
            if got:
                rooms = [rooms[0][got:], *rooms[1:]]

    def _open(self, path: Path) -> int:
        with self._change:
            if path not in self._files:
                self._files[path] = self._open_anew(path)
            return self._files[path]

    def _leave(self, path: Path) -> None:
        """After a read that failed, open a file anew where another one has taken its place since."""
        if path not in self._files:
            return
        with contextlib.suppress(OSError):
            if not os.path.samestat(os.stat(path), os.fstat(self._files[path])):
                self._stale.append(self._files.pop(path))  # other threads may be reading from it: closed at the end

    def _open_anew(self, path: Path) -> int:
        plain = os.O_RDONLY | getattr(os, "O_BINARY", 0)
        if self.page_cache == "direct":
            try:
                fd = os.open(path, plain | os.O_DIRECT)
            except (OSError, AttributeError) as error:
                if isinstance(error, FileNotFoundError | PermissionError):
                    raise
            else:
                if _reads_directly(fd):
                    return fd
                os.close(fd)
            self.page_cache = "drop"
        return os.open(path, plain)


def _in_place(job: _Job) -> bool:
    """Whether a direct read can go straight to its targets, as packed records can: a copy of each byte less."""
    starts = [job.start, *(target.ctypes.data for target in job.targets)]
    return all(n % ALIGNMENT == 0 for n in (*starts, *(target.nbytes for target in job.targets)))


def _reads_directly(fd: int) -> bool:
    """Some file systems open with O_DIRECT and then refuse to read."""
    try:
        os.preadv(fd, [mmap.mmap(-1, ALIGNMENT)], 0)
    except OSError:
        return False
    return True


def _pread_into(fd: int, buffers: Sequence[Any], offset: int) -> int:
    """os.preadv where there is none."""
    data = os.pread(fd, len(buffers[0]), offset)
    buffers[0][: len(data)] = data
    return len(data)


def _bytes_of(tensor: Tensor) -> np.ndarray:
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise BadInput(
            f"a tensor {list(tensor.shape)} on {tensor.device} cannot be read into: it must be contiguous, on the CPU"
        )
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def _where(job: _Job) -> str:
    return f"{job.source.path} at byte {job.start} (tensor {job.source.name})"
