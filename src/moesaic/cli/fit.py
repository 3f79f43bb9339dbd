"""`moesaic fit MODEL --memory 4GiB --data FILE`: the plan by which a model fits this machine, measured and written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moesaic.cli.common import Debug, Json, console, emit, progress_console, single
from moesaic.cli.loading import quiet_transformers
from moesaic.cli.options import Context, MaxBytes, Model, Threads, TrustRemoteCode
from moesaic.core.sizes import parse_bytes, show_bytes


def fit(
    model: Model,
    memory: Annotated[str, typer.Option(help="Bytes of weights in memory, such as 4GiB; the process adds about 0.5 GiB.")],
    data: Annotated[
        str | None, typer.Option(help="Your text, half to calibrate on, half to score; without it no lossy plan.")
    ] = None,
    quality: Annotated[
        float | None, typer.Option(help="Share of bits per byte that may be lost, such as 0.02; default: none.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the chosen checkpoint to this folder.")] = None,
    most: Annotated[int, typer.Option(help="Plans that are built and measured.")] = 8,
    work: Annotated[
        Path | None, typer.Option(help="Where plans are built, and stay for a next run; default: a temporary folder.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens that each plan writes to be timed.")] = 48,
    max_bytes: MaxBytes = None,
    context: Context = None,
    plan: Annotated[bool, typer.Option("--plan", help="Predict only: build and run nothing.")] = False,
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Keep, prune, merge, round and stream: which of it makes the model fit, how fast, at what cost in quality.

    Without --quality only plans that say bit for bit what the model says are chosen.

    \b
    moesaic fit bundled --memory 8MiB --data TEXT --quality 0.02 -o OUT
    moesaic fit MODEL --memory 4GiB --plan
    """
    quiet_transformers()
    from moesaic.bench.machine import load_or_measure
    from moesaic.fitting.fit import fit as find

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,}/{task.total:,}"))
    with Progress(*columns, TimeElapsedColumn(), console=progress_console, transient=True) as bar:
        task = bar.add_task("measuring the machine", total=1)
        report = find(
            model, parse_bytes(memory, "--memory"), read_rate=float(load_or_measure()["read_bytes_per_second"]),
            data=data, quality=quality, out=out, work=work, most=most, max_bytes=max_bytes, context=context,
            new_tokens=new_tokens, threads=threads, predict_only=plan,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    if json:
        emit(report)
        return
    _show(report, plan)


def _show(report: dict[str, Any], plan: bool) -> None:
    rows = report["candidates"] if plan else report["rows"]
    budget, total = show_bytes(report["memory_bytes"]), show_bytes(report["total_bytes"])
    table = Table(title=f"{report['model']} ({total}) in {budget}" + (": predicted, nothing was run" if plan else ""))
    for name, where in (("plan", "left"), ("memory", "right"), ("tokens/s", "right"), ("predicted", "right"),
                        ("bits/byte", "right"), ("", "left")):  # fmt: skip
        table.add_column(name, justify=where)  # type: ignore[arg-type]
    for row in rows:
        chosen = row["plan"] == report["chosen"]
        said = (
            ["exact" if row["exact"] else "lossy"] + (["Pareto"] if row.get("pareto") else []) + (["chosen"] if chosen else [])
        )
        table.add_row(
            row["plan"], show_bytes(row["memory_bytes"]),
            "" if plan else f"{row['tokens_per_second']:,.1f}", f"{row['predicted_tokens_per_second']:,.1f}",
            "" if plan else f"{row['bits_per_byte']:.4f}", ", ".join(said), style="bold" if chosen else "",
        )  # fmt: skip
    console.print(table)
    for note in report["notes"]:
        console.print(f"left out: {note}")
    if not plan and report["chosen"] is None:
        console.print("nothing chosen: no exact plan could run; allow a loss with --quality")
    if report["out"]:
        console.print(f"written: {report['out']}")
    if report["chosen"]:
        command, exact = next((row["command"], row["exact"]) for row in rows if row["plan"] == report["chosen"])
        if not report["out"] and not exact:  # it was built in a folder that is gone
            console.print("not kept: say --out FOLDER to have it written")
            return
        console.print(f"run it: {command.format(OUT=report['out'] or report['model'])}", soft_wrap=True)


app = single(fit)
