"""`moesaic bench unlearn`: SEUF against whole-model unlearning at equal forget loss."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.bench_common import figures, measured, words
from moesaic.cli.common import Debug, Json, console


def unlearn(
    model: Annotated[str, typer.Option(help="A local folder, a hub id, or `bundled`.")] = "bundled",
    data: Annotated[str, typer.Option(help="A folder with train and valid, documents by domain.")] = "../shared/data/corpus",
    task: Annotated[
        str, typer.Option(help="domain: forget --domain; facts: plant facts, then forget half of them.")
    ] = "domain",
    domain: Annotated[str, typer.Option(help="The domain to forget.")] = "python",
    rise: Annotated[float, typer.Option(help="Stop where the text to forget costs so many nats per token more.")] = 0.5,
    steps: Annotated[int, typer.Option(help="Steps of a cell, at most.")] = 100,
    lr: Annotated[float, typer.Option(help="Rate of SEUF.")] = 3e-3,
    lr_full: Annotated[float, typer.Option(help="Rate of whole-model unlearning.")] = 3e-4,
    seeds: Annotated[int, typer.Option(help="Seeds of every cell.")] = 2,
    losses: Annotated[str, typer.Option(help="By commas.")] = "ga,graddiff,npo,rmu",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Forget a domain or planted facts with one expert or with the whole model; what else is lost at equal forget loss."""
    import torch

    from moesaic.bench import unlearn as bench
    from moesaic.cli.loading import quiet_transformers

    quiet_transformers()
    torch.set_num_threads(threads)
    options = bench.Options(
        model, data, task, domain, rise, steps, lr, lr_full, seeds=seeds, losses=words(losses)
    )  # fmt: skip
    result = measured("unlearn", partial(bench.run, options), out, json)
    if result is not None:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    table = figures("method", "seed", "steps", "forget nats", "forget bpb", "retain bpb", "same experts", "recall", "s")
    for row in result["rows"]:
        recall = row.get("recall")
        table.add_row(
            row["impl"], str(row["seed"]), str(row["steps"]), f"{row['forget_nats_before']:.2f} -> {row['forget_nats']:.2f}",
            *(f"{row['before'][key]:.3f} -> {row['after'][key]:.3f}" for key in ("forget", "retain")),
            f"{row['router_overlap']['retain']:.1%}",
            "" if recall is None else f"{recall['forget']:.2f}, kept {recall['kept']:.2f}", f"{row['seconds']:.0f}",
        )  # fmt: skip
    console.print(table)
