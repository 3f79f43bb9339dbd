"""`moesaic bench stream`: a checkpoint larger than the memory it gets, from cold disk, under a real limit, ours beside
accelerate's disk offload and llama.cpp's memory map.

Each contestant runs alone in a control group whose memory, page cache included, is its share of the experts, the other
weights, and an allowance for its program: Python with PyTorch takes much more of it than llama.cpp, and neither gets to
hold experts in what the other needs for itself. All read the same tokens one by one, after a short prompt
and some tokens to warm up. The floor of a streamed run is the bytes that its cache missed over what the disk gives to
reads of that size. Ours must end with the very numbers of the resident model.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from moesaic.bench import generated, machine
from moesaic.bench.contestants.process import Contestant, has_llama_cpp, llama_command, model_command, write_gguf
from moesaic.bench.memory_limit import MemoryLimit, drop_page_cache
from moesaic.bench.token_stream import tokens
from moesaic.core.errors import BadInput
from moesaic.store import Reader, Table

SLOW = ("accelerate",)
"""Contestants that are given fewer tokens."""

ALLOWANCE = {"moesaic": 800 << 20, "accelerate": 800 << 20, "llama.cpp": 256 << 20}
"""Bytes of the limit beyond weights: the interpreter with its libraries, buffers, keys and values."""


@dataclass
class Options:
    """`shares`: of the expert bytes, resident."""

    folder: Path
    size: str = "1.3b"
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)
    peers: tuple[str, ...] = ("moesaic", "llama.cpp", "accelerate")
    policies: tuple[str, ...] = ("lru",)
    threads: int = 2
    prompt: int = 32
    warm: int = 16
    steps: int = 64
    slow_steps: int = 6
    llama_python: str = "python3"
    notes: list[str] = field(default_factory=list)

    def check(self) -> None:
        if self.size not in generated.SIZES:
            raise BadInput(f"--size {self.size!r}: one of {', '.join(generated.SIZES)}")
        wrong = [share for share in self.shares if not 0 < share <= 1]
        if wrong:
            raise BadInput(f"--shares {wrong[0]}: above 0, at most 1")
        for name in self.peers:
            if name not in ("moesaic", "llama.cpp", "accelerate"):
                raise BadInput(f"--peers {name!r}: moesaic, llama.cpp or accelerate")


def run(options: Options, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """A row per share and contestant, and per policy of ours."""
    options.check()
    size = generated.SIZES[options.size]
    folder = generated.generate(options.folder / options.size, size, progress)
    header, notes = machine.describe("cpu"), options.notes
    why = MemoryLimit.unavailable()
    if why:
        notes.append(f"{why}: figures are of an unlimited process, and the page cache helps those that use it")
    files = sorted(folder.glob("*.safetensors"))
    gguf = None
    if "llama.cpp" in options.peers:
        missing = has_llama_cpp(options.llama_python)
        if missing:
            notes.append(missing)
        else:
            progress("writing GGUF")
            gguf = write_gguf(options.llama_python, folder, "BF16")
    progress("measuring the disk")
    disk = disk_bandwidth(folder)
    ids = tokens(options.prompt + options.warm + options.steps)
    progress("the resident model")
    resident, top = _resident(folder, options, ids)
    rows = [resident]
    for share in options.shares:
        contests: list[tuple[str, list[str]]] = []
        if "moesaic" in options.peers:
            for policy in options.policies:
                how = {"resident": share, "policy": policy}
                contests.append((f"moesaic {policy}", model_command(folder, options.threads, "streamed", **how)))
        if gguf is not None:
            contests.append(("llama.cpp mmap", llama_command(options.llama_python, gguf, options.threads)))
        if "accelerate" in options.peers:
            offload = options.folder / f"{options.size}-offload"
            shutil.rmtree(offload, ignore_errors=True)
            how = {"resident": share, "offload": str(offload)}
            contests.append(("accelerate", model_command(folder, options.threads, "accelerate", **how)))
        for name, command in contests:
            progress(f"{share:.0%} resident: {name}")
            limit = round(2 * (share * size.bank_weights + size.other_weights)) + ALLOWANCE[name.split()[0]]
            drop_page_cache([*files, *([gguf] if gguf else [])])
            try:
                row = _contest(name, command, None if why else limit, options, ids)
            except BadInput as error:
                notes.append(f"{share:.0%}: {error}")
                continue
            row |= {"share": share, "limit_bytes": limit}
            if "read_bytes_per_token" in row:
                row["floor_seconds"] = row["read_bytes_per_token"] / disk
                row["of_floor"] = row["floor_seconds"] / row["seconds"]
                row["exact"] = row.pop("top") == top
            rows.append(row)
        shutil.rmtree(options.folder / f"{options.size}-offload", ignore_errors=True)
    return {"machine": header, "size": options.size, "disk_bytes_per_second": disk, "rows": rows, "notes": notes}


def _resident(folder: Path, options: Options, ids: list[int]) -> tuple[dict[str, Any], list[int]]:
    """Ours with everything in memory and no limit: what streaming is compared with, and the numbers it has to reach."""
    with Contestant("resident", model_command(folder, options.threads, "moesaic")) as one:
        seconds = _feed(one, options, ids, options.steps)
        top = one.ask("facts")["top"]
    row = {"impl": "moesaic resident", "share": 1.0, "seconds": median(seconds), "tokens_per_second": 1 / median(seconds)}
    return row, top


def _feed(one: Contestant, options: Options, ids: list[int], steps: int) -> list[float]:
    one.ask("prefill", ids[: options.prompt])
    warm = ids[options.prompt : options.prompt + options.warm]
    one.ask("decode", warm)
    one.ask("facts")
    return one.ask("decode", ids[options.prompt + options.warm :][:steps])["steps"]


def _contest(name: str, command: list[str], nbytes: int | None, options: Options, ids: list[int]) -> dict[str, Any]:
    slow = name in SLOW
    own = Options(**{**vars(options), "warm": 2}) if slow else options
    steps = options.slow_steps if slow else options.steps
    if nbytes is None:
        with Contestant(name, command) as one:
            return _measured(name, one, own, ids, steps)
    with MemoryLimit(nbytes) as limit:
        with Contestant(name, command, limit) as one:
            row = _measured(name, one, own, ids, steps)
            row["group_peak_bytes"] = limit.peak_bytes
        return row


def _measured(name: str, one: Contestant, options: Options, ids: list[int], steps: int) -> dict[str, Any]:
    seconds = _feed(one, options, ids, steps)
    facts = one.ask("facts")
    mean = sum(seconds) / len(seconds)
    row = {
        "impl": name, "load_seconds": one.loaded["seconds"], "load_peak_bytes": one.loaded["peak_bytes"],
        "seconds": mean, "seconds_median": median(seconds), "tokens_per_second": 1 / mean, "steps": len(seconds),
        "peak_bytes": facts["peak_bytes"],
    }  # fmt: skip
    if "read_bytes" in facts:
        row |= {
            "hit_rate": facts["hit_rate"], "read_bytes_per_token": facts["read_bytes"] / len(seconds),
            "stall_seconds_per_token": facts["stall_seconds"] / len(seconds), "top": facts["top"],
        }  # fmt: skip
    return row


def disk_bandwidth(folder: Path, seconds: float = 2.0, in_flight: int = 8) -> float:
    """Bytes per second of what misses are: experts of this checkpoint in random order, past the page cache."""
    table = Table.of_folder(folder)
    names = [name for name in table if ".experts." in name]
    order = np.random.default_rng(0).permutation(len(names))
    with_reader = Reader("direct", 4)
    try:
        room = [torch.empty(table[names[i]].shape, dtype=table[names[i]].dtype) for i in order[:in_flight]]
        waiting: list[Any] = []
        read, began = 0, time.perf_counter()
        for turn, i in enumerate(np.resize(order, 1 << 20)):
            stored = table[names[i]]
            target = room[turn % in_flight].view(-1)[: stored.nbytes // stored.dtype.itemsize]
            if len(waiting) == in_flight:
                waiting.pop(0).wait()
            if time.perf_counter() - began > seconds:
                break
            waiting.append(with_reader.fetch([(stored, target)]))
            read += stored.nbytes
        for ticket in waiting:
            ticket.wait()
        return read / (time.perf_counter() - began)
    finally:
        with_reader.close()
