"""Reads: the right bytes under every page-cache mode, in order of urgency, and an error for whatever goes wrong."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time

import numpy as np
import pytest
import torch

from moesaic.core.errors import BadInput
from moesaic.store import Range, Reader, ReadFailed
from moesaic.store import reader as module

SIZE = 300_000


@pytest.fixture
def data():
    return torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def path(tmp_path, data):
    file = tmp_path / "shard.safetensors"
    file.write_bytes(data.numpy().tobytes())
    return file


def part(path, start, end, name="w"):
    return Range(path, start, end - start, torch.uint8, (end - start,), name)


@pytest.mark.parametrize("mode", ["direct", "keep", "drop"])
@pytest.mark.parametrize("chunk", [4096, 1 << 22])
def test_any_range_in_any_mode(path, data, mode, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    spans = [(0, SIZE), (0, 1), (SIZE - 1, SIZE), (4095, 4097), (4096, 8192), (17, 200_003), (5, 5)]
    with Reader(mode, threads=3) as reader:
        for start, end in spans:
            assert torch.equal(reader.read(part(path, start, end)), data[start:end]), (start, end)
        assert reader.counters.bytes == sum(end - start for start, end in spans)
        assert reader.counters.reads >= len(spans) - 1
        assert reader.counters.seconds > 0


@pytest.mark.parametrize(("start", "end", "shift"), [(4096, 12288, 0), (4096, 12288, 8), (4100, 12292, 0), (4096, 12290, 0)])
def test_whole_pages_go_straight_into_whole_pages(path, data, start, end, shift):
    """A direct read needs no copy where file, memory and length allow it; the bytes are the same everywhere."""
    memory = torch.frombuffer(mmap.mmap(-1, 4 * 4096), dtype=torch.uint8)
    target, seen = memory[shift : shift + end - start], []

    def read_at(fd, buffers, offset):
        seen.extend(np.frombuffer(buffer, np.uint8).ctypes.data for buffer in buffers)
        return os.preadv(fd, buffers, offset)

    with Reader("direct", read_at=read_at) as reader:
        if reader.page_cache != "direct":
            pytest.skip("this file system has no direct reads")
        reader.fetch([(part(path, start, end), target)]).wait()
        straight = reader.page_cache == "direct" and (start, end, shift) == (4096, 12288, 0)
    assert torch.equal(target, data[start:end])
    assert (target.data_ptr() in seen) == straight


def test_the_page_cache_holds_what_the_mode_says(tmp_path, data):
    """`direct` and `drop` leave nothing behind, `keep` does; asked of the kernel with mincore where there is one."""
    held = {}
    for mode in ("direct", "drop", "keep"):
        file = tmp_path / mode
        file.write_bytes(data.numpy().tobytes() * 8)
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        with Reader(mode) as reader:
            reader.read(part(file, 0, 8 * SIZE))
            held[reader.page_cache] = resident_pages(file)
    assert held.pop("keep") > 400
    assert all(pages < 100 for pages in held.values()), held


def resident_pages(path):
    import ctypes
    import mmap

    size = path.stat().st_size
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), size, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=2) as memory:
        pages = -(-size // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        view = (ctypes.c_char * size).from_buffer(memory)
        assert ctypes.CDLL(None, use_errno=True).mincore(ctypes.byref(view), ctypes.c_size_t(size), found) == 0
        del view
        return sum(page & 1 for page in found)


def test_a_file_system_without_direct_reads(path, data, monkeypatch):
    monkeypatch.setattr(module, "_reads_directly", lambda fd: False)
    with Reader("direct") as reader:
        assert torch.equal(reader.read(part(path, 3, 9000)), data[3:9000])
        assert reader.page_cache == "drop"


@pytest.mark.parametrize("mode", ["direct", "keep"])
def test_a_file_cut_short_while_it_is_served(path, mode):
    with Reader(mode) as reader:
        reader.read(part(path, 0, 100))
        os.truncate(path, 150_000)
        with pytest.raises(
            ReadFailed, match=r"shard\.safetensors at byte 140000 \(tensor layer\.7\): the file ends 50000 bytes"
        ):
            reader.read(part(path, 140_000, 200_000, "layer.7"))
        assert reader.read(part(path, 0, 100)).numel() == 100


def test_a_read_error_names_file_offset_and_tensor(path):
    def broken(fd, buffers, offset):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Reader("keep", read_at=broken) as reader, pytest.raises(ReadFailed) as caught:
        reader.read(part(path, 10, 20, "experts.3"))
    assert str(caught.value) == f"{path} at byte 10 (tensor experts.3): Input/output error"


def test_reads_that_come_back_in_pieces_are_joined(path, data):
    def trickle(fd, buffers, offset):
        return os.preadv(fd, [buffers[0][:1000]], offset)

    with Reader("keep", read_at=trickle) as reader:
        assert torch.equal(reader.read(part(path, 7, 50_000)), data[7:50_000])


def test_a_hanging_read_times_out(path):
    release = threading.Event()

    def hang(fd, buffers, offset):
        release.wait(20)
        return os.preadv(fd, buffers, offset)

    began = time.perf_counter()
    with Reader("keep", timeout=0.2, read_at=hang) as reader:
        try:
            with pytest.raises(ReadFailed, match=r"at byte 8 \(tensor w\): no answer for 0\.2 s"):
                reader.read(part(path, 8, 16))
            assert time.perf_counter() - began < 5
        finally:
            release.set()


def test_a_missing_file(tmp_path):
    with Reader() as reader, pytest.raises(ReadFailed, match="No such file"):
        reader.read(part(tmp_path / "gone", 0, 4))


class Gate:
    """A reader of one thread that is held at its first read, and the order in which the others then come."""

    def __init__(self):
        self.open, self.busy, self.order = threading.Event(), threading.Event(), []

    def __call__(self, fd, buffers, offset):
        if not self.order:
            self.busy.set()
            assert self.open.wait(20)
        self.order.append(offset)
        return os.preadv(fd, buffers, offset)


def begin(reader, path, start, prefetch=False):
    return reader.fetch([(part(path, start, start + 10), torch.empty(10, dtype=torch.uint8))], prefetch)


def test_demand_goes_before_prefetch_and_a_wanted_prefetch_hurries(path):
    gate = Gate()
    with Reader("keep", threads=1, read_at=gate) as reader:
        first = begin(reader, path, 0)
        assert gate.busy.wait(20)
        early, late = begin(reader, path, 100, prefetch=True), begin(reader, path, 200, prefetch=True)
        wanted = begin(reader, path, 300)
        late.hurry()
        gate.open.set()
        for ticket in (first, early, late, wanted):
            ticket.wait()
        assert gate.order == [0, 200, 300, 100]


def test_a_prefetch_can_be_taken_back(path):
    gate = Gate()
    with Reader("keep", threads=1, read_at=gate) as reader:
        first, guess = begin(reader, path, 0), begin(reader, path, 100, prefetch=True)
        assert gate.busy.wait(20)
        guess.cancel()
        gate.open.set()
        first.wait()
        begin(reader, path, 300).wait()
        assert gate.order == [0, 300]
        with pytest.raises(ReadFailed, match="cancelled"):
            guess.wait()


def test_a_dropped_read_is_idle_only_when_no_thread_has_it(path):
    gate = Gate()
    with Reader("keep", threads=1, read_at=gate) as reader:
        running, queued = begin(reader, path, 0, prefetch=True), begin(reader, path, 100, prefetch=True)
        assert gate.busy.wait(20)
        for guess in (running, queued):
            guess.drop()  # does not wait: the gate is closed
            assert guess.done
        assert not running.idle
        assert queued.idle
        assert (running.moved_bytes, queued.moved_bytes) == (10, 0)
        gate.open.set()
        begin(reader, path, 300).wait()
        assert running.idle
        assert running.moved_bytes == 10
        assert gate.order == [0, 300]


def test_several_reads_are_in_flight(path):
    together = threading.Barrier(4, timeout=20)

    def meet(fd, buffers, offset):
        together.wait()
        return os.preadv(fd, buffers, offset)

    with Reader("keep", threads=4, read_at=meet) as reader:
        for ticket in [begin(reader, path, start) for start in (0, 10, 20, 30)]:
            ticket.wait()


def test_bad_arguments(path):
    with pytest.raises(BadInput, match="page cache 'fast': one of direct, keep, drop"):
        Reader("fast")
    with pytest.raises(BadInput, match="0 threads"):
        Reader(threads=0)
    with Reader("keep") as reader:
        with pytest.raises(BadInput, match="10 bytes do not fit a tensor of 12"):
            reader.fetch([(part(path, 0, 10), torch.empty(3))])
        with pytest.raises(BadInput, match="must be contiguous"):
            reader.fetch([(part(path, 0, 8), torch.empty(2, 8, dtype=torch.uint8)[:, :4])])
    with pytest.raises(ReadFailed, match="closed"):
        reader.read(part(path, 0, 1))
