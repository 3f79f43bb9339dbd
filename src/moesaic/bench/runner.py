"""What every benchmark shares: interleaved timing, errors, and the same benchmark on another revision."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput

Contestant = Callable[[int], Any]
"""Runs its work once on the inputs of that round; rounds cycle through fresh inputs, the same for everybody."""


def interleave(
    contestants: dict[str, Contestant], rounds: int, budget_seconds: float, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round. All run once per round, in turn, so that a busy machine is busy for
    everybody, and each round begins with another one, so that nobody always inherits the same neighbour's cache. At
    least three rounds, then until `rounds` or the budget is reached."""
    cuda = torch.device(device).type == "cuda"
    for run in contestants.values():  # warm up: caches, compilation, packing
        run(0)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    began = time.perf_counter()
    order = list(contestants.items())
    for i in range(rounds):
        for name, run in order[i % len(order) :] + order[: i % len(order)]:
            if cuda:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                start.record()
                run(i)
                end.record()
                torch.cuda.synchronize()
                seconds[name].append(start.elapsed_time(end) / 1e3)
            else:
                before = time.perf_counter()
                run(i)
                seconds[name].append(time.perf_counter() - before)
        if i >= 2 and time.perf_counter() - began > budget_seconds:
            break
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, minimum, and spread (interquartile range over median) of a contestant's rounds."""
    ordered = sorted(seconds)
    quarter = len(ordered) // 4
    middle = median(ordered)
    return {
        "seconds": middle,
        "seconds_min": ordered[0],
        "spread": (ordered[-1 - quarter] - ordered[quarter]) / middle,
        "rounds": len(ordered),
    }


def speedup(theirs: list[float], ours: list[float]) -> float:
    """How many times faster ours is: the median over rounds of their time by ours in the same round."""
    return median(t / o for t, o in zip(theirs, ours, strict=True))


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return float((got - want).norm() / want.norm().clamp(min=1e-300))


def repository() -> Path:
    """The git checkout this package is imported from. Raises BadInput for an installed package."""
    folder = Path(__file__).resolve().parent
    asked = subprocess.run(["git", "-C", str(folder), "rev-parse", "--show-toplevel"], capture_output=True, text=True)
    if asked.returncode:
        raise BadInput("--against needs a git checkout: this moesaic is not imported from one")
    return Path(asked.stdout.strip())


def at_revision(revision: str, arguments: list[str]) -> dict[str, Any]:
    """The JSON of `moesaic bench ARGUMENTS --json` as of a git revision, run in a worktree of it."""
    root = repository()
    with tempfile.TemporaryDirectory(prefix="moesaic-bench-") as folder:
        tree = Path(folder) / "tree"
        added = subprocess.run(
            ["git", "-C", str(root), "worktree", "add", "--detach", str(tree), revision], capture_output=True, text=True
        )
        if added.returncode:
            raise BadInput(f"--against {revision}: {added.stderr.strip().splitlines()[-1]}")
        try:
            script = "from moesaic.cli.main import main; main()"
            ran = subprocess.run(
                [sys.executable, "-c", script, "bench", *arguments, "--json"],
                cwd=tree,
                env={**_environment(), "PYTHONPATH": str(tree / "src")},
                capture_output=True,
                text=True,
            )
        finally:
            subprocess.run(["git", "-C", str(root), "worktree", "remove", "--force", str(tree)], capture_output=True)
    if ran.returncode:
        raise BadInput(f"the benchmark failed at {revision}: {(ran.stderr.strip() or 'no message').splitlines()[-1]}")
    return json.loads(ran.stdout)


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)
