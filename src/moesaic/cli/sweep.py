"""`moesaic sweep SWEEP.yaml`: many trainings over one recipe; run it again to go on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.common import Debug, Json, emit, progress_console, single
from moesaic.cli.sweeps import Budget, Jobs, Retry


def sweep(
    file: Annotated[Path, typer.Argument(help="A sweep file: base, and grid or cells; see docs/training.md.")],
    out: Annotated[str | None, typer.Option("--out", help="Folder of the cells, in place of the file's.")] = None,
    jobs: Jobs = 1,
    budget: Budget = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field of every cell.")] = None,
    retry: Retry = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train every cell that is not finished, each in its own process: a cell that fails does not stop the others.

    Writes OUT/cells/NAME-sSEED.json per cell, OUT/summary.json and OUT/curves.html. Exit code 1 when cells failed.
    """
    from moesaic.cli.sweeps import seconds, watch, write_summary
    from moesaic.laboratory.plan import read_plan
    from moesaic.laboratory.run import Sweep
    from moesaic.report.sweep_page import write_page
    from moesaic.training.config import parse_set

    limit = seconds(budget)
    plan = read_plan(file, out, dict(parse_set(change) for change in set_ or ()))
    running = Sweep(plan, jobs, limit, retry)
    running.add(plan.cells)
    ended = watch(progress_console, running, lambda: running.run(plan.base))
    told = write_summary(running, plan.out / "summary.json")
    page = write_page(plan.out / "curves.html", f"sweep {file.stem}", told)
    failed = [state.cell.key for state in running.states if state.status == "failed"]
    done = sum(state.status == "done" for state in running.states)
    result = {
        "out": str(plan.out), "cells": len(running.states), "done": done, "failed": failed, "missing": told["missing"],
        "summary": str(plan.out / "summary.json"), "page": str(page), "rows": told["rows"],
    }  # fmt: skip
    if json:
        emit(result)
    else:
        more = "" if ended else "; run the same command to go on"
        print(f"{done} of {len(running.states)} cells done, {len(failed)} failed{more}; curves in {page}")
    if failed:
        raise typer.Exit(1)


app = single(sweep)
