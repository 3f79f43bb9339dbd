"""`moesaic lab`: every router, bank and layer trained side by side; `--report` writes docs/laboratory.md from the results."""

from __future__ import annotations

import json as json_format
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.common import Debug, Json, emit, progress_console, single
from moesaic.cli.sweeps import Budget, Jobs, Retry

CAUSAL = ("routers", "banks", "layers", "balance")
DRAWN = ("topk", "dense-active", "dense-total", "hash", "adamoe", "autonomy_of_experts")
"""Cells whose curves stand in the picture of the page; the HTML file has all."""


def lab(
    file: Annotated[Path | None, typer.Argument(help="Cells in place of the laboratory's own.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder of the cells (default: runs/lab).")] = None,
    jobs: Jobs = 1,
    budget: Budget = None,
    closest: Annotated[int, typer.Option("--closest", min=0, help="Cells nearest to topk that get two more seeds.")] = 12,
    retry: Retry = False,
    report: Annotated[bool, typer.Option("--report", help="Train nothing: write results and page from what there is.")] = False,
    results: Annotated[Path, typer.Option("--results", help="The results file.")] = Path("benchmarks/results/lab.json"),
    page: Annotated[Path, typer.Option("--page", help="The Markdown file; its curves go beside it.")] = Path(
        "docs/laboratory.md"
    ),
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train every cell that is not finished, then the closest ones with more seeds. Run it again to go on."""
    from moesaic.cli.sweeps import seconds, watch, write_summary
    from moesaic.laboratory.plan import read_plan
    from moesaic.laboratory.run import Sweep
    from moesaic.laboratory.summary import closest as nearest
    from moesaic.laboratory.summary import rows

    limit = seconds(budget)
    own = resources.files("moesaic.laboratory").joinpath("lab.yaml")
    plan = read_plan(file or Path(str(own)), out)
    sweep = Sweep(plan, jobs, limit, retry)
    sweep.add(sorted(plan.cells, key=lambda cell: (cell.group != "reference", cell.seed)))  # the spread of seeds first

    def more_seeds() -> bool:
        """Take in the closest cells' further seeds; True when there are new ones to run."""
        found = rows(state.result for state in sweep.states if state.result is not None)
        names = set(nearest(found, "topk", closest, CAUSAL))
        picked = [cell for cell in plan.cells if cell.name in names and cell.seed == 0]
        before = len(sweep.states)
        sweep.add(plan.again(picked, [1, 2]))
        return any(state.status == "waiting" for state in sweep.states[before:])

    def run() -> bool:
        if not sweep.run(plan.base):
            return False
        return sweep.run(plan.base) if more_seeds() else True

    if report:
        if not any(state.status == "waiting" for state in sweep.states):
            more_seeds()
        told = _told(sweep, results, write_summary)
        files = write_report(told, page)
    else:
        watch(progress_console, sweep, run)
        told = write_summary(sweep, Path(plan.out) / "summary.json")
        files = [Path(plan.out) / "summary.json"]
    failed = [cell["cell"] for cell in told["cells"] if cell["status"] == "failed"]
    result = {"done": sum(cell["status"] == "done" for cell in told["cells"]), "failed": failed, "missing": told["missing"],
              "files": [str(path) for path in files], "rows": told["rows"]}  # fmt: skip
    if json:
        emit(result)
    else:
        told_of = f"{result['done']} trainings, {len(failed)} failed, {len(told['missing'])} missing"
        print(f"{told_of}; wrote {', '.join(map(str, files))}")
    if failed:
        raise typer.Exit(1)


def _told(sweep: Any, results: Path, write_summary: Any) -> dict[str, Any]:
    """The cells of the run folder when there are any, written to the results file; else that file as it is."""
    if any(state.result is not None for state in sweep.states) or not results.exists():
        return write_summary(sweep, results)
    return json_format.loads(results.read_text(encoding="utf-8"))


def write_report(told: dict[str, Any], page: Path) -> list[Path]:
    """The Markdown page, the picture of some curves and the page of all."""
    from moesaic.core.files import write_atomically
    from moesaic.laboratory.document import document
    from moesaic.report.curves import Run, svg
    from moesaic.report.sweep_page import write_page

    picture, curves = page.with_suffix(".svg"), page.with_suffix(".html")
    drawn = {cell["name"]: cell["curve"] for cell in told["cells"] if cell["status"] == "done" and cell["seed"] == 0}
    runs = [Run(name, _points(drawn[name]["loss"]), _points(drawn[name]["valid"]), []) for name in DRAWN if name in drawn]
    page.parent.mkdir(parents=True, exist_ok=True)
    files = [write_page(curves, "the laboratory", told)]
    if runs:
        files.append(write_atomically(picture, svg(runs)))
    machine = told["machine"]
    where = f"one core of {machine['cpu']}, torch {machine['torch']}"
    files.append(write_atomically(page, document(told, where, picture.name, curves.name)))
    return files


def _points(curve: list[list[float]]) -> list[tuple[int, float]]:
    return [(int(step), value) for step, value in curve]


app = single(lab)
