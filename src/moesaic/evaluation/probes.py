"""What a running process takes, read from outside the model: memory of each tier, processor time, and energy counters.

A gauge that cannot be read here is there all the same, with the reason: what is not measured is never 0.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

POWERCAP = Path("/sys/class/powercap")
CACHE_EVERY = 1.0
"""Seconds between two looks at the page cache: each asks the kernel about every page of the files."""


@dataclass(frozen=True)
class Gauge:
    """One signal. `read` gives its value now (bytes, or joules since any moment); None where `why_not` says why.

    `capacity` is what the tier holds at most, in the same unit, where that is known.
    """

    name: str
    read: Callable[[], float] | None = None
    why_not: str | None = None
    capacity: float | None = None


def memory_gauges(files: Sequence[Path] = ()) -> list[Gauge]:
    """Bytes of every tier: the process, the page cache's part of `files`, and what PyTorch allocated and reserved on a GPU."""
    return [_process(), _page_cache(files), *_gpu()]


def _process() -> Gauge:
    page = mmap.PAGESIZE

    def resident() -> float:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * page

    if not Path("/proc/self/statm").exists():
        return Gauge("process", why_not="this system has no /proc/self/statm")
    return Gauge("process", resident, capacity=float(os.sysconf("SC_PHYS_PAGES")) * page)


def _page_cache(files: Sequence[Path]) -> Gauge:
    if not files:
        return Gauge("page_cache", why_not="no local files of weights to ask about")
    try:
        cached_bytes(files[0])
    except (OSError, AttributeError, ValueError) as error:
        return Gauge("page_cache", why_not=f"the kernel does not say: {error}")
    held = [0.0, -CACHE_EVERY]

    def read() -> float:
        now = time.monotonic()
        if now - held[1] >= CACHE_EVERY:
            held[:] = [float(sum(cached_bytes(file) for file in files)), now]
        return held[0]

    return Gauge("page_cache", read)


def cached_bytes(file: Path) -> int:
    """Bytes of a file that the kernel's page cache holds. Raises OSError where it does not tell."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = file.stat().st_size
    if not size:
        return 0
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        pages = -(-size // mmap.PAGESIZE)
        here = (ctypes.c_ubyte * pages)()
        first = ctypes.c_ubyte.from_buffer(mapped)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), here)
        del first  # else the mapping could not be closed
        if failed:
            raise OSError(ctypes.get_errno(), f"mincore of {file}: {os.strerror(ctypes.get_errno())}")
    return min(size, int((np.frombuffer(bytes(here), np.uint8) & 1).sum()) * mmap.PAGESIZE)


def _gpu() -> list[Gauge]:
    if not torch.cuda.is_available():
        return [Gauge("gpu", why_not="no GPU")]
    _, capacity = torch.cuda.mem_get_info()
    return [
        Gauge("gpu_allocated", torch.cuda.memory_allocated, capacity=capacity),
        Gauge("gpu_reserved", torch.cuda.memory_reserved, capacity=capacity),  # what the allocator keeps from others
    ]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def energy_gauges(powercap: Path = POWERCAP) -> list[Gauge]:
    """Joules: processor packages and their memory through Linux' powercap (Intel, and AMD from Zen on), GPUs through NVML.

    Counters are of the whole machine, whoever keeps it busy.
    """
    return [*_rapl(powercap), *_nvml()]


def _rapl(powercap: Path) -> list[Gauge]:
    found: list[Gauge] = []
    refused = None
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            if not name.startswith(("package", "dram")):  # cores lie inside packages, and psys around them
                continue
            span = int((zone / "max_energy_range_uj").read_text())
            found.append(Gauge(f"{name} ({zone.name})", Unwrapped(zone / "energy_uj", span)))
        except (OSError, ValueError) as error:
            refused = f"{zone}: {getattr(error, 'strerror', None) or error}"
    if refused is not None:  # a part of the machine would pass for all of it
        return [Gauge("cpu", why_not=f"cannot read {refused}; root may")]
    return found or [Gauge("cpu", why_not=f"no energy counters in {powercap}")]


class Unwrapped:
    """Joules since the first call, from a counter of microjoules that begins anew after `span`. Raises OSError."""

    def __init__(self, counter: Path, span: int) -> None:
        self._counter, self._span = counter, span
        self._last = int(counter.read_text())
        self._total = 0

    def __call__(self) -> float:
        now = int(self._counter.read_text())
        self._total += now - self._last if now >= self._last else now + self._span - self._last
        self._last = now
        return self._total / 1e6


def _nvml() -> list[Gauge]:
    """Not yet run on a GPU."""
    if not torch.cuda.is_available():
        return []
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        for handle in handles:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except ImportError:
        return [Gauge("gpu", why_not="pynvml is not installed: pip install nvidia-ml-py")]
    except pynvml.NVMLError as error:
        return [Gauge("gpu", why_not=f"NVML: {error}")]

    def joules(handle: Any) -> Callable[[], float]:
        return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3

    return [Gauge(f"gpu {i}", joules(handle)) for i, handle in enumerate(handles)]
