"""`moesaic bench surgery`: pruning a checkpoint on disk, ours beside llm-compressor and the disk's floor."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from typer import Option

from moesaic.cli.bench_common import figures, measured, show_notes, words
from moesaic.cli.bench_models import CACHE, Folder, Out, Threads
from moesaic.cli.common import Debug, Json, console
from moesaic.core.sizes import show_bytes


def surgery(
    size: Annotated[str, Option(help="4.2b (8.8 GB, of OLMoE's shape), 1.3b, 6.9b or tiny.")] = "4.2b",
    folder: Folder = CACHE,
    keep: Annotated[float, Option(help="Share of the experts that stays.")] = 0.5,
    data: Annotated[str, Option(help="Text to calibrate on.")] = "../shared/data/corpus/valid",
    max_bytes: Annotated[int, Option(help="Of each domain of the text.")] = 2000,
    context: Annotated[int, Option(help="Tokens per piece of text.")] = 512,
    cases: Annotated[str, Option(help="prune (statistics are there), reap (calibrates and prunes).")] = "prune,reap",
    peer_python: Annotated[str, Option(help="An interpreter that has llmcompressor and datasets.")] = "",
    threads: Threads = 2,
    rounds: Annotated[int, Option(help="Of every case.")] = 1,
    out: Out = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Halve the experts of a generated checkpoint on disk: seconds, memory, and the floor of bytes over the disk's speed."""
    from moesaic.bench import surgery as bench
    from moesaic.cli.loading import quiet_transformers

    quiet_transformers()
    options = bench.Options(
        folder.expanduser(), size, keep, data, max_bytes, context, words(cases), peer_python, threads, rounds
    )
    result = measured("surgery", partial(bench.run, options), out, json)
    if result is None:
        return
    disk = result["disk"]
    console.print(
        f"{show_bytes(result['model_bytes'])}, {result['tokens']:,} tokens of calibration; disk {disk['read'] / 1e9:.2f} GB/s "
        f"in, {disk['write'] / 1e9:.2f} GB/s out"
    )
    table = figures("", "s", "floor s", "/floor", "peak", "limit")
    for row in result["rows"]:
        table.add_row(
            f"{row['case']}, {row['impl']}", f"{row['seconds']:,.1f}", f"{row['floor_seconds']:,.1f}",
            f"{row['seconds'] / row['floor_seconds']:.2f}", show_bytes(row["peak_bytes"]), show_bytes(row["limit_bytes"]),
        )  # fmt: skip
    console.print(table)
    show_notes(result)
