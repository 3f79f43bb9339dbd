"""`moesaic bench soak`: stream a generated model under a budget for a long time and see whether its memory stays flat.

Prompts change all the time, in content and in length, so that the cache turns over and every size of buffer is met. What
imports, compiles and allocates once does so before the first sample; what an allocator keeps grows in the first minutes of
any process, so that the slope is fitted to the last two thirds.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from moesaic.bench import generated, machine
from moesaic.core.errors import BadInput, MoesaicError

LENGTHS = (1, 7, 32, 100)
"""Tokens of the prompts, in turn."""


@dataclass
class Options:
    """`share`: of the expert bytes, resident. `every`: seconds between two samples. `written`: tokens after each prompt."""

    folder: Path
    size: str = "tiny"
    minutes: float = 30.0
    share: float = 0.25
    policy: str = "lru"
    threads: int = 1
    every: float = 2.0
    written: int = 16

    def check(self) -> None:
        if self.size not in generated.SIZES:
            raise BadInput(f"--size {self.size!r}: one of {', '.join(generated.SIZES)}")
        for name, value in (("minutes", self.minutes), ("every", self.every)):
            if not value > 0:
                raise BadInput(f"--{name} {value}: give more than 0")
        if self.threads < 1:
            raise BadInput(f"--threads {self.threads}: must be at least 1")


def run(options: Options, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Memory by thirds of the time (medians, bytes), its slope (MB an hour), hits, requests and errors."""
    options.check()
    header = machine.describe("cpu")
    size = generated.SIZES[options.size]
    folder = generated.generate(options.folder / options.size, size, progress)
    from moesaic.serving.streamed import load_streamed
    from moesaic.view import quiet

    torch.set_num_threads(options.threads)
    errors: list[str] = []
    requests = tokens = 0
    with quiet(), load_streamed(folder, resident=options.share, policy=options.policy) as streamed:
        for number in range(len(LENGTHS)):
            _answer(streamed.model, size.vocabulary, number, options.written)
        streamed.engine.clear()
        with Sampler(options.every) as held:
            end = time.monotonic() + 60 * options.minutes
            while time.monotonic() < end:
                try:
                    tokens += _answer(streamed.model, size.vocabulary, requests, options.written)
                except MoesaicError as error:
                    errors.append(str(error))
                requests += 1
                left = (end - time.monotonic()) / 60
                progress(f"{left:.1f} minutes left, {requests} prompts, {show(held.latest)}")
        stats, plan, held_bytes = streamed.stats.row(), streamed.engine.plan, streamed.engine.held_bytes
    return {
        "machine": header, "size": options.size, "policy": options.policy, "minutes": options.minutes,
        "memory_bytes": plan.budget_bytes, "expert_resident_bytes": held_bytes, "requests": requests, "tokens": tokens,
        "errors": len(errors), "first_errors": errors[:3], **summary(held.seconds, held.bytes),
        **{key: stats[key] for key in ("hit_rate", "accesses", "hits", "evictions", "read_bytes", "stall_seconds", "passes")},
    }  # fmt: skip


def _answer(model: Any, vocabulary: int, number: int, written: int) -> int:
    """Write after a random prompt; tokens read and written."""
    length = LENGTHS[number % len(LENGTHS)]
    ids = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(number))
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=written, min_new_tokens=written, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    return length + written


class Sampler:
    """Resident memory, of this process unless `read` says otherwise, sampled in a thread while a `with` block runs."""

    def __init__(self, every: float, read: Callable[[], int] | None = None) -> None:
        self.every, self.read = every, read or resident_bytes
        self.seconds: list[float] = []
        self.bytes: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    @property
    def latest(self) -> int:
        return self.bytes[-1] if self.bytes else 0

    def _loop(self) -> None:
        began = time.monotonic()
        while True:
            self.seconds.append(time.monotonic() - began)
            self.bytes.append(self.read())
            if self._stop.wait(self.every):
                return

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def resident_bytes(process: int | str = "self") -> int:
    """Memory of a process that is resident now. Raises BadInput where the system does not tell."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError) as error:
        raise BadInput(f"bench soak reads /proc/{process}/statm, which is not to be had here ({error})") from error


def summary(seconds: list[float], held: list[int]) -> dict[str, Any]:
    """Medians of the first and the last third, the slope over the last two thirds, and the number of samples."""
    third = max(1, len(held) // 3)
    later_s, later_b = np.array(seconds[third:]), np.array(held[third:], float)
    slope = float(np.polyfit(later_s, later_b, 1)[0]) if len(later_s) > 1 else 0.0
    return {
        "samples": len(held),
        "first_third_bytes": int(median(held[:third])),
        "last_third_bytes": int(median(held[-third:])),
        "peak_sample_bytes": max(held),
        "slope_mb_per_hour": slope * 3600 / 1e6,
    }


def show(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB resident"
