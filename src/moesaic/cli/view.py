"""`moesaic view MODEL`: a model's experts, block by block. `moesaic view --coverage`: every architecture, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from moesaic.cli.common import Debug, Json, console, emit, progress_console, single
from moesaic.core.errors import BadInput


def view(
    model: Annotated[str | None, typer.Argument(help='A model folder, a hub id, or "bundled".')] = None,
    coverage: Annotated[bool, typer.Option("--coverage", help="Check every architecture on a tiny random model.")] = False,
    only: Annotated[str | None, typer.Option(help="With --coverage: names to check, such as 'qwen*,gpt_oss'.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="With --coverage: processes.")] = 2,
    markdown: Annotated[Path | None, typer.Option(help="With --coverage: write the table to this file.")] = None,
    dtype: Annotated[str, typer.Option(help="Load as this dtype.")] = "auto",
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """List a model's Mixture-of-Experts blocks, or check every architecture of the installed transformers."""
    if coverage:
        if model is not None:
            raise BadInput("--coverage checks every architecture: leave MODEL out, or use --only")
        _coverage(only, jobs, markdown, json_output)
    elif model is None:
        raise BadInput("name a MODEL (a folder, a hub id or bundled), or use --coverage")
    else:
        _model(model, dtype, json_output)


def _model(name: str, dtype: str, json_output: bool) -> None:
    from moesaic.view import load, quiet
    from moesaic.view import view as open_view

    with quiet():
        loaded = load(name, dtype=dtype)
    blocks = open_view(loaded)
    rows: list[dict[str, Any]] = [
        {
            "name": block.name,
            "layer": block.layer,
            "experts": block.num_experts,
            "top_k": block.top_k,
            "kind": str(block.kind),
            "expert_bytes": block.expert_bytes,
            "shared_bytes": block.shared_bytes,
        }
        for block in blocks
    ]
    summary = {"model": name, **blocks.summary(), "blocks": rows}
    if json_output:
        emit(summary)
        return
    table = Table(title=f"{summary['architecture']} ({name})")
    for column in ("block", "experts", "top-k", "kind", "one expert", "all experts", "shared"):
        table.add_column(column, justify="left" if column in ("block", "kind") else "right", no_wrap=column == "block")
    for row in rows:
        one, shared = row["expert_bytes"], row["shared_bytes"]
        cells = [row["experts"], row["top_k"], row["kind"], _size(one), _size(one * row["experts"])]
        table.add_row(row["name"], *map(str, cells), _size(shared) if shared else "")
    console.print(table)
    routed, shared, total = summary["expert_bytes"], summary["shared_bytes"], summary["total_bytes"]
    beside = f", {_size(shared)} in shared ones" if shared else ""
    console.print(
        f"{len(rows)} blocks, {summary['parameters']:,} parameters, {_size(total)}: "
        f"{_size(routed)} ({routed / total:.0%}) in routed experts{beside}"
    )


def _coverage(only: str | None, jobs: int, markdown: Path | None, json_output: bool) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from moesaic.view import coverage

    names = coverage.names(only)
    if not names:
        raise BadInput(f"--only {only}: no architecture of that name; `moesaic view --coverage` lists them")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    reports = []
    with Progress(*columns, console=progress_console, transient=True) as progress:
        task = progress.add_task("checking", total=len(names))
        for name, report in coverage.run(names, jobs):
            reports.append((name, report))
            progress.update(task, advance=1, description=f"checked {name}")
            if not report["ok"]:
                progress_console.print(f"[red]{name}[/]: {report['reason']}")
    result = coverage.summarise(reports)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(coverage.markdown(result), encoding="utf-8")
    if json_output:
        emit(result)
    else:
        _print_coverage(result)
    if result["supported"] < result["total"]:
        raise typer.Exit(1)


def _print_coverage(result: dict[str, Any]) -> None:
    table = Table(title="architectures with experts, each as a tiny random model")
    for column in ("architecture", "blocks", "kernels: error", "seconds", "result"):
        table.add_column(column, justify="left" if column in ("architecture", "result") else "right")
    for name, report in result["architectures"].items():
        error = report["checks"].get("kernels")
        outcome = "ok" if report["ok"] else f"[red]{report['reason']}[/]"
        error_cell = f"{error:.1e}" if isinstance(error, float) else ""
        table.add_row(name, str(report["blocks"]), error_cell, f"{report['seconds']:.1f}", outcome)
    console.print(table)
    console.print(f"{result['supported']} of {result['total']} architectures (transformers {result['transformers']})")


def _size(n: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


app = single(view)
