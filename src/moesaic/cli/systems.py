"""`moesaic systems`: every registered method, its paper and its state; the source of docs/systems.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from moesaic.cli.common import Debug, Json, console, emit, single
from moesaic.core.registry import Entry, entries

HEAD = """# Systems

Every method that is registered, printed by `moesaic systems --markdown`. "Tested" names the tests that hold it to
its card and its naive twin; "GPU" says whether its code has run on one.

| Family | Name | What it is | Paper | Card | Exact | Needs | Tested | GPU |
|---|---|---|---|---|---|---|---|---|
"""

COST_HEAD = """## What routing costs

What each router declares, with its default options, at D = {dim}, E = {experts} and sequences of {length} tokens: its
parameters, and the FLOPs of routing one token in training, solvers included. The bank is not in it.

| Router | Parameters | FLOPs per token |
|---|---|---|"""


def row(entry: Entry) -> dict[str, Any]:
    """One system as the keys of `systems --json`."""
    return {
        "family": entry.family,
        "name": entry.name,
        "summary": entry.summary,
        "paper": entry.paper,
        "card": entry.card,
        "exact": entry.exact,
        "needs": sorted(entry.needs),
        "causal": entry.causal,
        "tested": TESTED[entry.family],
        "router_cost": router_cost(entry) if entry.family == "routing" else None,
        "gpu": entry.facts.get("gpu", GPU.get(entry.family, "torch ops; not yet run on a GPU")),
    }


GPU = {
    "statistics": "NumPy, on the CPU",
    "policies": "NumPy, on the CPU",
    "lossy": "streaming is on the CPU",
    "schedules": "plain Python",
    "orchestration": "NumPy, on the CPU",
}
"""What holds for a whole family that says nothing by method."""
TESTED = {
    "routing": "tests/routing, tests/matrix/test_routers.py",
    "experts": "tests/experts, tests/matrix/test_banks.py",
    "balancing": "tests/balancing, tests/matrix/test_balancers.py",
    "layers": "tests/layers, tests/matrix/test_layers.py",
    "schedules": "tests/schedules",
    "kernels": "tests/kernels",
    "lossy": "tests/serving/test_lossy.py",
    "policies": "tests/trace/policies, tests/matrix/test_policies.py",
    "statistics": "tests/trace/statistics, tests/cli/test_analyze.py",
    "prune": "tests/surgery/prune",
    "merge": "tests/surgery/merge",
    "compress": "tests/surgery/compress",
    "quantize": "tests/surgery/quantize",
    "upcycle": "tests/surgery/upcycle",
    "distill": "tests/surgery/distill",
    "unlearn": "tests/surgery/unlearn",
    "edit": "tests/surgery/edit",
    "steering": "tests/steering",
    "orchestration": "tests/orchestration",
}


COST_SHAPE = {"dim": 1024, "experts": 64}
COST_LENGTH = 1024


def router_cost(entry: Entry) -> dict[str, float]:
    """What a router declares to cost at that shape, with its defaults, in sequences of that length."""
    router = entry.build(**COST_SHAPE)
    return {"parameters": router.parameter_count, "flops_per_token": router.flops_per_token(COST_LENGTH)}


def costs() -> str:
    """The routers' costs as a table; the matrix tests hold them to what runs."""
    lines = [COST_HEAD.format(**COST_SHAPE, length=COST_LENGTH)]
    for entry in entries("routing"):
        cost = router_cost(entry)
        lines.append(f"| `{entry.name}` | {cost['parameters']:,} | {cost['flops_per_token']:,.0f} |")
    return "\n".join(lines) + "\n"


def markdown() -> str:
    lines = []
    for r in map(row, entries()):
        paper = f"[{r['paper']}](https://arxiv.org/abs/{r['paper']})" if r["paper"] else ""
        cells = [r["family"], f"`{r['name']}`", r["summary"], paper, r["card"], "yes" if r["exact"] else "no"]
        cells += [", ".join(r["needs"]), r["tested"], r["gpu"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return HEAD + "\n".join(lines) + "\n\n" + costs()


def systems(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/systems.md.")] = False,
    check: Annotated[Path | None, typer.Option(help="Exit with 1 when this file is not what --markdown prints.")] = None,
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List every method: its family, paper, card, what it needs and where it is tested."""
    if check is not None:
        fresh = check.exists() and check.read_text() == markdown()
        console.print(f"{check}: {'up to date' if fresh else 'stale: run make docs'}")
        raise typer.Exit(0 if fresh else 1)
    found = [row(entry) for entry in entries(family)]
    if json:
        emit({"systems": found})
    elif as_markdown:
        print(markdown(), end="")
    else:
        table = Table("family", "name", "what it is", "paper", "needs")
        for r in found:
            table.add_row(r["family"], r["name"], r["summary"], r["paper"] or "", ", ".join(r["needs"]))
        console.print(table)


app = single(systems)
