"""`moesaic bench stream-gpu`: experts in host memory under a GPU with a small budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich import box
from rich.table import Table
from typer import Option

from moesaic.cli.common import Debug, Json, console, emit, keep, progress_console
from moesaic.core.sizes import show_bytes


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


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

    options = bench.Options(size, budget, _words(policies), _words(peers), device, steps=steps)
    with progress_console.status("") as status:
        result = bench.run(options, lambda text: status.update(f"bench stream-gpu: {text}"))
    keep(result, out)
    if json:
        emit(result)
        return
    header = result["machine"]
    console.print(
        f"{header['gpu']}, torch {header['torch']}; {result['size']}, {show_bytes(result['budget_bytes'])} on the device"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("implementation", no_wrap=True)
    for name in ("tok/s", "ms", "median", "hit %", "MB/tok", "of floor", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            row["impl"], f"{row['tokens_per_second']:,.2f}", f"{row['seconds'] * 1e3:,.0f}",
            f"{row['seconds_median'] * 1e3:,.0f}", f"{row['device_hit_rate']:.1%}" if "device_hit_rate" in row else "",
            f"{row['moved_bytes_per_token'] / 1e6:,.0f}", f"{row['of_floor']:.2f}", show_bytes(row["peak_device_bytes"]),
        )  # fmt: skip
    console.print(table)
    link = result["link_bytes_per_second"] / 1e9
    console.print(f"link: {link:.1f} GB/s in copies of one expert. of floor: bytes moved over that, against the time taken.")
    for note in result["notes"]:
        console.print(f"note: {note}")
