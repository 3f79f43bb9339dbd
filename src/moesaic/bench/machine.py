"""What this machine can do: memory, matmul and disk speeds, measured once and kept as its profile.

The floors of every benchmark come from here, and so may a policy's choices: measure the machine, then choose.
"""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MiB = 1 << 20


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    family = re.search(r"cpu family\s*:\s*(\d+)\nmodel\s*:\s*(\d+)", text)
    name = found.group(1).strip() if found else platform.machine()
    return f"{name} (family {family.group(1)}, model {family.group(2)})" if family else name


def cpu_features() -> list[str]:
    """Instruction sets that decide how fast bf16 and int8 are."""
    checks = {
        "avx2": "_is_avx2_supported",
        "avx512": "_is_avx512_supported",
        "avx512_bf16": "_is_avx512_bf16_supported",
        "vnni": "_is_vnni_supported",
        "amx": "_is_amx_tile_supported",
    }
    return [name for name, check in checks.items() if getattr(torch.cpu, check, lambda: False)()]


def describe(device: str = "cpu") -> dict[str, Any]:
    """The header of every result: hardware and versions."""
    import transformers

    header: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": cpu_features(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if torch.device(device).type == "cuda":
        header["gpu"] = torch.cuda.get_device_name(device)
        header["cuda"] = torch.version.cuda
    return header


def slug(header: dict[str, Any]) -> str:
    """A folder name for results of this kind of machine: cores, CPU, its fastest instruction set, or the GPU."""
    text = header.get("gpu") or f"{header['cores']}x-{header['cpu']}-{(header['features'] or ['plain'])[-1]}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _best(work: Callable[[], Any], device: str, repeats: int) -> float:
    def timed() -> float:
        before = time.perf_counter()
        work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - before

    timed()
    return min(timed() for _ in range(repeats))


def _memory(device: str, megabytes: int, repeats: int) -> dict[str, float]:
    source = torch.randn(megabytes * MiB // 4, device=device)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), device, repeats)
    # A matrix-vector product streams: a plain sum can be bound by its own arithmetic.
    matrix, pair = source.view(-1, 1024), torch.randn(2, 1024, device=device)
    read = min(_best(source.sum, device, repeats), _best(lambda: matrix @ pair.T, device, repeats))
    return {"copy_bytes_per_second": 2 * source.nbytes / copy, "read_bytes_per_second": source.nbytes / read}


def _matmul(device: str, dtype: torch.dtype, side: int, repeats: int) -> float:
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / _best(lambda: a @ b, device, repeats)


def _disk(folder: Path, megabytes: int) -> float | None:
    """Random 3 MiB reads past the page cache (O_DIRECT), bytes per second; None where that is not possible."""
    import mmap

    size = 3 * MiB
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            for _ in range(megabytes * MiB // size):
                file.write(os.urandom(size))
            file.flush()
            os.fsync(file.fileno())
            handle = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
            try:
                buffer = mmap.mmap(-1, size)
                count = megabytes * MiB // size
                order = torch.randperm(count).tolist()
                before = time.perf_counter()
                for i in order:
                    os.preadv(handle, [buffer], i * size)
                return count * size / (time.perf_counter() - before)
            finally:
                os.close(handle)
    except (OSError, AttributeError):
        return None


def measure(device: str = "cpu", quick: bool = False, disk_folder: Path | None = None) -> dict[str, Any]:
    """Measure now. Keys end in their unit."""
    cuda = torch.device(device).type == "cuda"
    repeats = 3 if quick else 9
    profile: dict[str, Any] = _memory(device, 1024 if cuda else (128 if quick else 256), repeats)
    side = 8192 if cuda else (1024 if quick else 2048)
    profile["bfloat16_flops"] = _matmul(device, torch.bfloat16, side, repeats)
    profile["float32_flops"] = _matmul(device, torch.float32, side, repeats)
    if not cuda and not quick:
        profile["disk_bytes_per_second"] = _disk(disk_folder or Path(tempfile.gettempdir()), 192)
    return profile


def profile_path(device: str = "cpu") -> Path:
    """Where this machine's profile is kept, in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "moesaic" / f"{slug(describe(device))}-{torch.get_num_threads()}threads.json"


def save(profile: dict[str, Any], device: str = "cpu") -> Path:
    path = profile_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": describe(device), **profile}, indent=2) + "\n")
    return path


def load_or_measure(device: str = "cpu") -> dict[str, Any]:
    """The kept profile, or a quick measurement where none is kept (which is not kept)."""
    path = profile_path(device)
    if path.is_file():
        return json.loads(path.read_text())
    return measure(device, quick=True)
