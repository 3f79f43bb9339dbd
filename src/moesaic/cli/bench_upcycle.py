"""`moesaic bench upcycle`: what several ways of making one model of dense ones are worth after equally many tokens."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.bench_common import figures, measured, words
from moesaic.cli.common import Debug, Json, console


def upcycle(
    data: Annotated[str, typer.Option(help="A folder with train and valid, documents by domain.")] = "../shared/data/corpus",
    domains: Annotated[str, typer.Option(help="One specialised copy each, by commas.")] = "python,prose,math",
    seed_steps: Annotated[int, typer.Option(help="Steps of the dense seed.")] = 60,
    branch_steps: Annotated[int, typer.Option(help="Steps of each copy on its domain.")] = 30,
    steps: Annotated[int, typer.Option(help="Steps of every arm afterwards, on the mixture.")] = 20,
    lr: Annotated[float, typer.Option(help="Rate of the seed; half of it afterwards.")] = 2e-3,
    arms: Annotated[str, typer.Option(help="Some of the arms only, such as dense,btx,bam.")] = "",
    seed: Annotated[int, typer.Option(help="Of weights and of the order of the data.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a small dense seed and copies of it on domains, upcycle them, fine-tune equally long, compare."""
    import torch

    from moesaic.bench import upcycle as bench
    from moesaic.cli.loading import quiet_transformers

    quiet_transformers()
    torch.set_num_threads(threads)
    options = bench.Options(
        data, words(domains), seed_steps=seed_steps, branch_steps=branch_steps, steps=steps, lr=lr, seed=seed,
        arms=words(arms) if arms else (),
    )  # fmt: skip
    result = measured("upcycle", partial(bench.run, options), out, json)
    if result is None:
        return
    table = figures("start", "parameters", "bits per byte before", "after", "s")
    for row in result["rows"]:
        table.add_row(
            row["impl"], f"{row['parameters']:,}", f"{row['before']['mean']:.4f}", f"{row['after']['mean']:.4f}",
            f"{row['seconds']:.0f}",
        )  # fmt: skip
    console.print(table)
