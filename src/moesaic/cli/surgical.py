"""What `surgery` and its families share on the command line: how steps are planned, run and shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from moesaic.cli.common import console, emit, facts_grid, progress_console
from moesaic.cli.loading import quiet_transformers
from moesaic.core import registry
from moesaic.core.errors import BadInput
from moesaic.core.sizes import show_bytes

Out = Annotated[Path | None, typer.Argument(help="The folder to write: not there yet, or empty.")]
Options = Annotated[str, typer.Option(help="Options of the method, such as protect=true,scope=global.")]
CalibrationData = Annotated[str | None, typer.Option("--data", help="Text to calibrate on: a file or a folder.")]
Statistics = Annotated[str | None, typer.Option(help="A folder of `moesaic calibrate` of this very model, instead of --data.")]
Domain = Annotated[str | None, typer.Option(help="Calibrate on this domain only.")]
Sequential = Annotated[
    bool, typer.Option("--sequential", help="Calibrate each layer with those before it already changed; takes longer.")
]
Plan = Annotated[bool, typer.Option("--plan", help="Say what would be done and written, and do nothing.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was broken off.")]


def run_family(
    family: str, model: str, out: Path | None, method: str, options: dict[str, Any], *, plan: bool, resume: bool, json: bool,
    threads: int | None, trust_remote_code: bool, **calibration: Any,
) -> None:  # fmt: skip
    """One step of a layer-wise family."""
    from moesaic.surgery.recipe import Step

    run([Step(family, method, options, **calibration)], model, out, plan, resume, json, threads, trust_remote_code)


def run(
    steps: list[Any], model: str, out: Path | None, plan: bool, resume: bool, json: bool, threads: int | None, trust: bool
) -> None:  # fmt: skip
    """Plan or run steps, and say what came of it."""
    if out is None and not plan:
        raise BadInput("OUT is missing: name the folder to write, or pass --plan")
    if not plan and out is not None:
        show(execute(steps, model, out, resume, threads, trust), json)
        return
    from moesaic.cli.options import use_threads
    from moesaic.surgery.estimate import estimate
    from moesaic.surgery.recipe import plan_recipe

    use_threads(threads)
    quiet_transformers()
    plans = plan_recipe(model, steps, trainer, trust_remote_code=trust)
    _show_plan(plans, [estimate(each, step) for each, step in zip(plans, steps, strict=True)], out, json)


def execute(steps: list[Any], model: str, out: Path, resume: bool, threads: int | None, trust: bool) -> dict[str, Any]:
    """Run steps under a bar of progress; the report of `run_recipe`."""
    from moesaic.cli.options import use_threads
    from moesaic.surgery.recipe import run_recipe
    from moesaic.training.finetune import finetune

    use_threads(threads)
    quiet_transformers()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,}/{task.total:,}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=progress_console, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        return run_recipe(
            model, out, steps, trainer=trainer, train=finetune, resume=resume, progress=advance, trust_remote_code=trust
        )


def trainer(step: Any, source: Path, out: Path | None, resume: bool = False) -> dict[str, Any]:
    """A trained step of a recipe, with the project's loop and scorer."""
    from moesaic.cli import trained

    given = {"steps": 100, "lr": 1e-4, "batch_size": 4, "seq_len": 256, "seed": 0, "until": None, **step.training}
    unknown = sorted(set(given) - {"steps", "lr", "batch_size", "seq_len", "seed", "until"})
    if unknown:
        raise BadInput(f"{step.name}: training has no field {unknown[0]!r}")
    most = step.max_bytes
    entry = registry.get(step.family, step.method)
    own_form = getattr(entry.build, "readers", {})  # the method reads these files itself
    options = dict(step.options)
    if "answers" in step.texts and "answers" in entry.parameters:
        options["answers"] = True
    if step.family == "distill" and step.teacher is None:
        raise BadInput(f"{step.name}: teacher is missing: the model to learn from")
    if step.teacher is not None:
        given["teacher"] = step.teacher
    texts: dict[str, Any] = {}
    for name, path in step.texts.items():
        keep = name == "forget" or step.family != "unlearn"
        texts[name] = path if name in own_form else trained.of_domain(name, path, step.domain, keep=keep, max_bytes=most)
    return trained.run(
        str(source), out, family=step.family, method=step.method, options=options, texts=texts, held_out={},
        context=step.context, plan=out is None, resume=resume, **given,
    )  # fmt: skip


def _show_plan(plans: list[Any], costs: list[dict[str, Any]], out: Path | None, json: bool) -> None:
    rows = []
    for plan, cost in zip(plans, costs, strict=True):
        rows.append(
            {
                "method": f"{plan.family} {plan.method}", "options": plan.options, "experts": plan.experts,
                "bytes_before": plan.bytes_before, "bytes_after": plan.bytes_after, "stock": plan.stock,
                "checkpoint": plan.reason, "config": plan.fields, **cost,
            }
        )  # fmt: skip
    if json:
        emit({"out": None if out is None else str(out), "plan": rows})
        return
    table = Table(title="plan: nothing is written")
    for name in ("step", "experts", "size", "memory", "time, about", "checkpoint"):
        table.add_column(name)
    for row in rows:
        counts = sorted(set(row["experts"]))
        size = f"{show_bytes(row['bytes_before'])} -> {show_bytes(row['bytes_after'])}"
        method = row["method"] + (", layer after layer" if row["sequential"] else "")
        table.add_row(
            method, " or ".join(map(str, counts)), size, show_bytes(row["peak_bytes"]), f"{row['seconds']:,.0f} s",
            ("stock: " if row["stock"] else "") + row["checkpoint"],
        )  # fmt: skip
    console.print(table)


def show(report: dict[str, Any], json: bool) -> None:
    if json:
        emit(report)
        return
    grid = facts_grid()
    for row in report["steps"]:
        grid.add_row(row["method"], f"{show_bytes(row['bytes_after'])} after {row['seconds']:,.1f} s")
    share = report["bytes_after"] / report["bytes_before"]
    grid.add_row("size", f"{show_bytes(report['bytes_after'])} of {show_bytes(report['bytes_before'])} ({share:.0%})")
    grid.add_row("memory", f"{show_bytes(report['peak_bytes'])} at most")
    grid.add_row("loads with", "transformers" if report["stock"] else "transformers after `import moesaic`")
    grid.add_row("read back", "every block says from disk what it said in memory")
    grid.add_row("lossy", f"measure it: moesaic eval {report['out']} --data YOUR_TEXT")
    console.print(grid)
