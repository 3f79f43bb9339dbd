"""`moesaic search-loss`: evolve balance losses; each candidate trains the reference model for a few seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from moesaic.cli.common import Debug, Json, console, emit, keep, progress_console, single


def search_loss(
    data: Annotated[str, typer.Option(help="File or folder of {text, domain} documents to train on.")],
    out: Annotated[Path, typer.Option(help="Folder of the journal; the same command goes on from it.")],
    generations: Annotated[int, typer.Option(help="Candidates per island, beside the seeds.")] = 20,
    islands: Annotated[int, typer.Option(help="Populations that exchange their best now and then.")] = 2,
    steps: Annotated[int, typer.Option(help="Optimiser steps of a training run.")] = 60,
    runs: Annotated[int, typer.Option(help="Training runs per candidate, of different seeds.")] = 1,
    experts: Annotated[int, typer.Option(help="Experts per layer of the model that is trained.")] = 16,
    coefficient: Annotated[float, typer.Option(help="What the expression is multiplied by in the objective.")] = 0.01,
    start: Annotated[list[str] | None, typer.Option(help="An expression to start from; may be repeated.")] = None,
    proposer: Annotated[
        list[str] | None,
        typer.Option(help="package.module:function, or a command that answers JSON lines; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
    result: Annotated[Path | None, typer.Option(help="Also write the JSON object here.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Search for a balance loss. What is found is used as `balance: {expression: {text: ..., coefficient: ...}}`."""
    import torch

    from moesaic.cli.loading import quiet_transformers
    from moesaic.training.loss_fitness import ShortRuns, read_bytes
    from moesaic.training.loss_proposers import Command, named
    from moesaic.training.loss_search import LossSearch, Settings

    quiet_transformers()
    torch.set_num_threads(threads)
    tail = max(1, steps // 4)
    fitness = ShortRuns(
        read_bytes(data), steps, tail, tuple(range(runs)), coefficient=coefficient, experts=experts, k=min(2, experts)
    )
    plugged: dict[str, Any] = {name: Command(name) if _is_command(name) else named(name) for name in proposer or ()}
    settings = Settings(generations=generations, islands=islands, seed=seed)
    about = {"steps": steps, "runs": runs, "experts": experts, "coefficient": coefficient, "bytes": len(fitness.text)}
    search = LossSearch(fitness, out, start or ["E * sum(f * P)"], settings, plugged, about)
    try:
        with Live(console=progress_console, auto_refresh=False, transient=True) as live:
            search.run(lambda state: live.update(_table(state), refresh=True) if state.candidates else None)
    finally:
        for one in plugged.values():
            if isinstance(one, Command):
                one.close()
    found = _result(search, fitness)
    keep(found, result)
    if json:
        emit(found)
    else:
        console.print(_table(search))
        first, best = found["seed"], found["best"]
        console.print(f"best: {best['expression']}\nfitness {best['fitness']:.4f}; where it started: {first['fitness']:.4f}")


def _is_command(name: str) -> bool:
    """A callable is named by `module:function`, without spaces or slashes."""
    return ":" not in name or " " in name or "/" in name


def _result(search: Any, fitness: Any) -> dict[str, Any]:
    def row(candidate: Any) -> dict[str, Any]:
        facts = {"island": candidate.island, "how": candidate.how, "proposer": candidate.proposer}
        return {"expression": candidate.text, **candidate.result, **facts}

    ordered = sorted(search.candidates, key=lambda c: -c.fitness)
    return {
        "journal": str(search.journal),
        "candidates": len(search.candidates),
        "rejected": search.rejected,
        "steps": fitness.steps,
        "runs": len(fitness.seeds),
        "seed": row(search.candidates[0]),
        "best": row(ordered[0]),
        "none": fitness.of({}),
        "rows": [row(c) for c in ordered[:20]],
    }


def _table(search: Any) -> Table:
    title = f"{len(search.candidates)} of {search.total} losses"
    table = Table("fitness", "loss", "imbalance", "MaxVio", "how", "expression", title=title)
    seen: set[str] = set()
    for c in sorted(search.candidates, key=lambda c: -c.fitness):
        if c.text in seen or len(seen) == 10:
            continue
        seen.add(c.text)
        numbers = [f"{c.result[key]:.4f}" for key in ("fitness", "cross_entropy", "imbalance")]
        table.add_row(*numbers, f"{c.result['max_vio']:.2f}", c.how, c.text)
    return table


app = single(search_loss)
