"""`moesaic bench steering`: the cost of each steering method per written token."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.bench_common import figures, measured
from moesaic.cli.common import Debug, Json, console


def steering(
    model: Annotated[str, typer.Option(help="A local folder, a hub id, or bundled.")] = "bundled",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 64,
    tokens: Annotated[int, typer.Option(help="New tokens of each answer.")] = 32,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = 1,
    rounds: Annotated[int, typer.Option(help="Rounds, at most.")] = 10,
    seconds: Annotated[float, typer.Option(help="Time, about.")] = 120.0,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """What each steering method costs per token, interleaved with the model as it is."""
    import torch

    from moesaic.bench import steering as bench

    if threads:
        torch.set_num_threads(threads)
    options = bench.Options(model, dtype, prompt, tokens, rounds, seconds)
    result = measured("steering", partial(bench.run, options), out, json)
    if result is None:
        return
    header = result["machine"]
    console.print(f"{header['cpu']}, {header['threads']} threads; torch {header['torch']}; load {header['load_before']}")
    table = figures("method", "ms per answer", "spread", "ms per token", "times generate")
    for row in result["rows"]:
        table.add_row(
            row["impl"], f"{row['seconds'] * 1e3:,.0f}", f"{row['spread']:.0%}", f"{row['seconds_per_token'] * 1e3:.2f}",
            f"{row['times_base']:.2f}",
        )  # fmt: skip
    console.print(table)
