"""`moesaic calibrate MODEL --data PATH -o FOLDER`: every statistic that surgery asks for, in one pass over a text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moesaic.cli import options
from moesaic.cli.common import Debug, Json, console, emit, progress_console, single
from moesaic.cli.loading import open_model
from moesaic.core.errors import BadInput


def calibrate(
    model: options.Model = "bundled",
    data: options.Data = "",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder to write.")] = None,
    tiers: Annotated[
        str, typer.Option(help="R0 router, R1 routed outputs, R2 second moments, A1 all experts, C features, B gradients.")
    ] = "R0,R1",
    by_domain: Annotated[bool, typer.Option("--by-domain", help="Keep every statistic apart for each domain.")] = False,
    max_bytes: options.MaxBytes = None,
    seed: Annotated[int | None, typer.Option(help="With --max-bytes: sample documents with this seed.")] = None,
    context: options.Context = None,
    batch_size: options.BatchSize = None,
    memory: Annotated[str, typer.Option(help="Bytes the statistics may take, such as 4GiB; fewer mean more passes.")] = "",
    layers_at_once: Annotated[int | None, typer.Option(help="Layers collected per pass; default: all.")] = None,
    every: Annotated[int, typer.Option(help="Tier A1 on one token in so many.")] = 1,
    shard: Annotated[str, typer.Option(help="i/n: take every n-th piece of text from i on; --merge adds the shards.")] = "0/1",
    trace: Annotated[Path | None, typer.Option(help="Also record this .moetrace, in the same pass.")] = None,
    merge: Annotated[list[Path] | None, typer.Option(help="Add up these shards into --out instead; several times.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from where an interrupted run was saved.")] = False,
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Collect counts, norms, moments and gradients per layer and expert: what pruning, merging and quantising read."""
    if out is None:
        raise BadInput("--out is missing: name the folder to write")
    began = time.perf_counter()
    if merge:
        from moesaic.trace.calibration import merge as add
        from moesaic.trace.calibration import open_calibration

        _show(add([open_calibration(part) for part in merge], out), time.perf_counter() - began, json)
        return
    options.check_text(data, max_bytes, batch_size, threads)
    from moesaic.core.documents import read_documents, select
    from moesaic.core.primitives import keep_few
    from moesaic.core.sizes import parse_bytes
    from moesaic.trace import calibration

    options.use_threads(threads)
    keep_few()
    documents = select(read_documents(data), max_bytes, seed)
    opened = open_model(model, dtype, trust_remote_code=trust_remote_code)
    loaded, tokenizer = opened.model, opened.tokenizer
    columns = (TextColumn("calibrating"), BarColumn(), TextColumn("{task.completed:,.0f} / {task.total:,.0f} tokens"))
    with Progress(*columns, TimeRemainingColumn(), console=progress_console, transient=True) as bar:
        task = bar.add_task("calibrating", total=1)
        found = calibration.calibrate(
            loaded, documents, out, tokenizer=tokenizer, tiers=tiers, by_domain=by_domain, context=context,
            batch_size=batch_size, memory=parse_bytes(memory, "--memory") if memory else None,
            layers_at_once=layers_at_once, every=every, shard=_shard(shard), trace=trace,
            trace_options={"source": data, "name": model}, source=data, name=model, resume=resume,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    _show(found, time.perf_counter() - began, json)


def _shard(text: str) -> tuple[int, int]:
    first, _, last = text.partition("/")
    try:
        return int(first), int(last)
    except ValueError:
        raise BadInput(f"--shard {text!r}: two numbers such as 0/4") from None


def _show(found: Any, seconds: float, json: bool) -> None:
    size = sum(path.stat().st_size for path in found.folder.rglob("*") if path.is_file())
    facts = {
        "out": str(found.folder),
        "layers": len(found),
        "tiers": list(found.header.tiers),
        "domains": list(found.header.domains),
        "tokens": found.header.progress.get("tokens"),
        "complete": found.header.progress.get("complete"),
        "bytes": size,
        "seconds": seconds,
        "statistics": sorted(found.layer(0).sums),
    }
    if json:
        emit(facts)
        return
    table = Table(title=f"{found.folder}: {facts['tokens']:,} tokens, {size / 1e6:,.1f} MB, {seconds:,.1f} s")
    table.add_column("layer")
    for name in ("tokens", "busiest expert", "idle experts"):
        table.add_column(name, justify="right")
    for number, layer in enumerate(found.header.layers):
        stats = found.layer(number)
        if "selection_count" not in stats.sums:
            table.add_row(layer.name, "", "", "")
            continue
        count_E = stats["selection_count"]
        busiest = f"{int(count_E.argmax())} ({float(count_E.max() / count_E.sum()):.1%} of choices)"
        table.add_row(layer.name, f"{int(stats['token_count']):,}", busiest, str(int((count_E == 0).sum())))
    console.print(table)


app = single(calibrate)
