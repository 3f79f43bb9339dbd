"""`moesaic pack MODEL OUT`: a copy of a checkpoint whose experts stream with one aligned read each, in the bits you choose."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from moesaic.cli.common import Debug, Json, console, emit, facts_grid, progress_console, single
from moesaic.cli.loading import quiet_transformers
from moesaic.cli.options import Model, TrustRemoteCode
from moesaic.core.errors import BadInput

if TYPE_CHECKING:
    import numpy as np

    from moesaic.serving.streamed.packing import Plan


def pack(
    model: Model,
    out: Annotated[Path | None, typer.Argument(help="The folder to write: not there yet, or empty.")] = None,
    bits: Annotated[
        str, typer.Option(help="Of experts: 16 (as stored), 8, 4, 2, a JSON file, or the mean that --importance spreads.")
    ] = "16",
    group: Annotated[int, typer.Option(help="Weights of a row that share a scale, in 8, 4 and 2 bits: 32, 64 or 128.")] = 64,
    importance: Annotated[
        Path | None, typer.Option(help="A .moetrace of the model: the most used experts get more bits, --bits in the mean.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a packing that was broken off.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be written, and write nothing.")] = False,
    threads: Annotated[int, typer.Option(help="Reads in flight.")] = 4,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Pack a checkpoint for streaming: every expert one aligned record, lossless or in fewer bits; fp8 ones are widened.

    \b
    moesaic pack MODEL OUT                lossless: fewer, larger reads
    moesaic pack MODEL OUT --bits 4 --plan
    moesaic pack MODEL OUT --bits 4       rounded to 4 bits and scales
    moesaic pack MODEL OUT --bits 5 --importance run.moetrace
    moesaic pack MODEL OUT --bits bits.json
    moesaic run OUT "Once upon a time" --memory 6GiB

    A file of bits names blocks and experts, as in {"default": 4, "model.layers.0.mlp.experts": 8,
    "model.layers.3.mlp.experts.17": 16}.
    """
    if group not in (32, 64, 128):
        raise BadInput(f"--group {group}: one of 32, 64, 128")
    if threads < 1:
        raise BadInput(f"--threads {threads}: must be at least 1")
    if out is None and not plan:
        raise BadInput("OUT is missing: name the folder to write, or pass --plan")
    began = time.perf_counter()
    quiet_transformers()
    from moesaic.serving.streamed.bits import parse_bits
    from moesaic.serving.streamed.packing import pack as write
    from moesaic.serving.streamed.packing import plan_packing

    chosen = parse_bits(bits, None if importance is None else _usage(importance))
    how: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if plan or out is None:
        _show(plan_packing(model, chosen, group, **how), out, False, time.perf_counter() - began, json)
        return
    columns = (TextColumn("packing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress_console, transient=True) as bar:
        task = bar.add_task("packing", total=None)
        done = write(
            model, out, bits=chosen, group_size=group, resume=resume, threads=threads,
            progress=lambda now, total: bar.update(task, completed=now, total=total), **how,
        )  # fmt: skip
    _show(done, out, True, time.perf_counter() - began, json)


def _usage(path: Path) -> np.ndarray:
    """How often each expert of each layer was chosen [L, E], -1 where a layer has no such expert."""
    import numpy as np

    from moesaic.trace import open_trace
    from moesaic.trace.statistics.counting import count

    counted = count(open_trace(path))
    return np.where(counted.real_LE, counted.counts_ULE.sum(0), -1)


def _show(plan: Plan, out: Path | None, written: bool, seconds: float, json: bool) -> None:
    held = Counter(str(bits) for block in plan.contents.blocks for bits in block.bits_E)
    facts = {
        "out": None if out is None else str(out),
        "written": written,
        "model": plan.contents.model,
        "blocks": len(plan.contents.blocks),
        "experts": sum(held.values()),
        "experts_by_bits": dict(held),
        "group_size": plan.contents.group_size,
        "lossless": plan.lossless,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "expert_bytes": plan.expert_bytes,
        "other_bytes": plan.other_bytes,
        "seconds": seconds,
    }
    if json:
        emit(facts)
        return
    grid = facts_grid()
    share = plan.bytes_after / max(1, plan.bytes_before)
    grid.add_row("experts", ", ".join(f"{count:,} in {bits} bits" for bits, count in held.items()))
    grid.add_row("size", f"{plan.bytes_after / 1e9:,.3f} GB of {plan.bytes_before / 1e9:,.3f} ({share:.0%})")
    grid.add_row("of these", f"{plan.expert_bytes / 1e9:,.3f} GB experts, {plan.other_bytes / 1e9:,.3f} GB other weights")
    grid.add_row("logits", "those of the checkpoint, bit for bit" if plan.lossless else "those of rounded experts")
    if written:
        grid.add_row("written", f"{out} in {seconds:,.1f} s")
    console.print(grid)


app = single(pack)
