"""`moesaic bench stream-gpu`: experts in host memory under a GPU with a small budget."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Option

from moesaic.cli.bench_common import figures, measured, show_notes, words
from moesaic.cli.common import Debug, Json, console
from moesaic.core.sizes import show_bytes


def stream_gpu(
    size: Annotated[str, Option(help="30b-a3b (58 GB in host memory) or tiny.")] = "30b-a3b",
    budget: Annotated[str, Option(help="Of everything on the device.")] = "12GB",
    policies: Annotated[str, Option(help="Policies of the device tier, by commas.")] = "lru,hybrimoe:ahead=0",
    peers: Annotated[str, Option(help="moesaic, accelerate.")] = "moesaic,accelerate",
    device: Annotated[str, Option(help="cuda or cuda:NUMBER.")] = "cuda",
    steps: Annotated[int, Option(help="Tokens measured.")] = 64,
    out: Annotated[Path | None, Option(help="Also write the JSON to this file.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """A generated model of 30B-A3B's shape in host memory, on a GPU that may use little: ours beside accelerate's offload."""
    from moesaic.bench import stream_gpu as bench

    options = bench.Options(size, budget, words(policies), words(peers), device, steps=steps)
    result = measured("stream-gpu", partial(bench.run, options), out, json)
    if result is None:
        return
    header = result["machine"]
    console.print(
        f"{header['gpu']}, torch {header['torch']}; {result['size']}, {show_bytes(result['budget_bytes'])} on the device"
    )
    table = figures("implementation", "tok/s", "ms", "median", "hit %", "MB/tok", "of floor", "peak")
    for row in result["rows"]:
        table.add_row(
            row["impl"], f"{row['tokens_per_second']:,.2f}", f"{row['seconds'] * 1e3:,.0f}",
            f"{row['seconds_median'] * 1e3:,.0f}", f"{row['device_hit_rate']:.1%}" if "device_hit_rate" in row else "",
            f"{row['moved_bytes_per_token'] / 1e6:,.0f}", f"{row['of_floor']:.2f}", show_bytes(row["peak_device_bytes"]),
        )  # fmt: skip
    console.print(table)
    link = result["link_bytes_per_second"] / 1e9
    console.print(f"link: {link:.1f} GB/s in copies of one expert. of floor: bytes moved over that, against the time taken.")
    show_notes(result)
