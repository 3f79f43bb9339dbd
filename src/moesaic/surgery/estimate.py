"""What a step will cost here: seconds by this disk's and this processor's measured speed, and memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moesaic.core.documents import data_files
from moesaic.store import Reader
from moesaic.store.table import Table
from moesaic.surgery.planning import LAYERWISE, Plan, build

if TYPE_CHECKING:
    from moesaic.surgery.recipe import Step

BASE_BYTES = 450 << 20
"""Of Python, torch and transformers themselves."""

SAMPLE_BYTES = 64 << 20
BYTES_PER_TOKEN = 4.0
"""Of text, for an estimate."""

TRAINING = 6
"""FLOPs per weight and token of a step of training; 2 of a forward pass."""


def estimate(plan: Plan, step: Step) -> dict[str, Any]:
    """`seconds`, `peak_bytes`, and what they are made of. Reads a sample of the model's file, and multiplies two matrices."""
    rate, flops = disk_rate(plan.source), cpu_flops()
    experts = sum(f.experts * f.expert_bytes for f in plan.facts)
    active = sum(f.top_k * f.expert_bytes for f in plan.facts) + plan.bytes_before - experts
    tokens, kind = 0.0, 2
    if step.data is not None and step.statistics is None:
        tokens = _tokens(step)
    if step.trains:
        given = {"steps": 100, "batch_size": 4, "seq_len": 256, **step.training}
        tokens, kind = float(given["steps"] * given["batch_size"] * given["seq_len"]), TRAINING
    moved = plan.bytes_after * 2 + (plan.bytes_before if tokens else 0)
    passes = 2 if step.sequential else 1  # every layer runs untouched, and again as it was changed
    if step.sequential:
        moved += plan.bytes_before  # read again for the change, and what is no expert for its pass
    return {
        "seconds": moved / rate + passes * tokens * kind * active / 2 / flops,
        "sequential": step.sequential,
        "peak_bytes": plan.peak_bytes + BASE_BYTES + _statistics_bytes(plan, step),
        "disk_bytes_per_second": rate,
        "calibration_tokens": round(tokens),
    }


def _statistics_bytes(plan: Plan, step: Step) -> int:
    """Of one layer's second moments (tier R2), the only statistics that weigh as much as experts do."""
    if step.trains or step.family not in LAYERWISE:
        return 0
    entry, _ = build(step.family, step.method, dict(step.options))
    if "R2" not in entry.needs:
        return 0
    return max(4 * f.experts * (f.width**2 + f.inner**2) for f in plan.facts)


def disk_rate(folder: Path) -> float:
    """Bytes per second that the model's largest tensor comes in with, past the page cache where the system can."""
    table = Table.of_folder(folder)
    largest = max(table.values(), key=lambda tensor: tensor.nbytes)
    with Reader("direct") as reader:
        piece = largest.piece(0, min(SAMPLE_BYTES, largest.nbytes))
        began = time.perf_counter()
        reader.read(piece)
    return piece.nbytes / max(time.perf_counter() - began, 1e-6)


def cpu_flops() -> float:
    """FLOPs per second of a bf16 product here."""
    a, b = torch.ones(512, 1024, dtype=torch.bfloat16), torch.ones(1024, 1024, dtype=torch.bfloat16)
    a @ b
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 0.1:
        a @ b
        count += 1
    return count * 2 * 512 * 1024 * 1024 / (time.perf_counter() - began)


def _tokens(step: Step) -> float:
    size = 0
    for path in data_files(str(step.data)):
        size += min(path.stat().st_size, step.max_bytes or path.stat().st_size)
    return size / BYTES_PER_TOKEN
