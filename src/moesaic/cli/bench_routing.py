"""`moesaic bench routing`: every router beside plain top-k and beside a whole layer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.bench_common import figures, measured, words
from moesaic.cli.common import Debug, Json, console

LIMIT = 0.25
"""Share of the layer's time above which docs/routing-speed.md says why."""


def routing(
    tokens: Annotated[int, typer.Option("--tokens", "-T", help="Tokens T.")] = 4096,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    width: Annotated[int, typer.Option("--width", "-D", help="Model width D.")] = 1024,
    inner: Annotated[int, typer.Option("--inner", "-I", help="Expert inner width I of the layer.")] = 512,
    experts: Annotated[int, typer.Option("--experts", "-E", help="Experts E.")] = 64,
    slots: Annotated[int, typer.Option("--slots", "-K", help="Experts per token K.")] = 8,
    routers: Annotated[str, typer.Option(help="Names by commas; default: all.")] = "",
    mode: Annotated[str, typer.Option(help="train (forward and backward) or eval (forward).")] = "train",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds, at most.")] = 20,
    seconds: Annotated[float, typer.Option(help="Time, about.")] = 120.0,
    layer: Annotated[bool, typer.Option(help="Also time the layer, and give shares of it.")] = True,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """What each router costs over plain top-k, interleaved, also as a share of the whole layer's time."""
    import torch

    from moesaic.bench import routing as bench

    if threads:
        torch.set_num_threads(threads)
    options = bench.Options(tokens, length, width, inner, experts, slots, words(routers), mode, device, rounds, seconds, layer)
    result = measured("routing", partial(bench.run, options), out, json)
    if result is not None:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    header, options = result["machine"], result["options"]
    where = header.get("gpu") or f"{header['cpu']}, {header['threads']} threads"
    console.print(f"{where}; torch {header['torch']}; load {header['load_before']}; {options['mode']}")
    table = figures("router", "ms", "spread", "floor ms", "over topk ms", "of the layer")
    for row in sorted(result["rows"], key=lambda row: -(row["seconds"] or 0)):
        if row["seconds"] is None:
            table.add_row(row["impl"], "", "", "", "", f"[dim]{row['error']}[/dim]")
            continue
        share, floor = row.get("share_of_layer"), row["floor_seconds"]
        shown = "" if share is None else f"{share:.1%}"
        table.add_row(
            row["impl"],
            f"{row['seconds'] * 1e3:,.1f}",
            f"{row['spread']:.0%}",
            "" if floor is None else f"{floor * 1e3:,.1f}",
            f"{row['overhead_seconds'] * 1e3:,.1f}" if "overhead_seconds" in row else "",
            f"[red]{shown}[/red]" if share is not None and share > LIMIT else shown,
        )
    console.print(table)
