"""`moesaic bench decode`, `stream` and `soak`: whole models, generated for it."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.bench_common import figures, measured, show_notes, words
from moesaic.cli.common import Debug, Json, console
from moesaic.core.errors import BadInput
from moesaic.core.sizes import show_bytes

Folder = Annotated[
    Path, typer.Option(help="Where generated checkpoints are kept; several times the model's size is written there.")
]
LlamaPython = Annotated[str, typer.Option(help="An interpreter that has llama-cpp-python and gguf.")]
Threads = Annotated[int, typer.Option(help="CPU threads of every contestant.")]
Size = Annotated[str, typer.Option(help="1.3b (2.6 GB), 6.9b (13.8 GB) or tiny.")]
Out = Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")]
CACHE = Path("~/.cache/moesaic/bench")


def decode(
    size: Size = "1.3b",
    folder: Folder = CACHE,
    peers: Annotated[str | None, typer.Option(help="Contestants by commas; default: all that can run.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 256,
    steps: Annotated[int, typer.Option(help="Tokens decoded in each round.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds, in which all take turns.")] = 5,
    threads: Threads = 2,
    llama_python: LlamaPython = sys.executable,
    out: Out = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """A generated Qwen3-MoE in memory: prompt and decoding, ours beside transformers and llama.cpp."""
    from moesaic.bench import decode as bench

    options = bench.Options(
        folder.expanduser(), size, threads=threads, prompt=prompt, steps=steps, rounds=rounds, llama_python=llama_python
    )
    if peers is not None:
        options.peers = words(peers)
    result = measured("decode", partial(bench.run, options), out, json)
    if result is None:
        return
    _show_machine(result)
    table = figures("", "tok/s", "ms", "min", "spread", "/floor", "peak")
    for case in ("prefill", "decode"):
        table.add_section()
        table.add_row(f"[bold]{case}[/bold]")
        for row in result["rows"]:
            if row["case"] == case:
                floor = row.get("floor_seconds")
                table.add_row(
                    f"  {row['impl']}", f"{row['tokens_per_second']:,.1f}", f"{row['seconds'] * 1e3:,.1f}",
                    f"{row['seconds_min'] * 1e3:,.1f}", f"{row['spread']:.0%}",
                    f"{row['seconds'] / floor:.2f}" if floor else "", show_bytes(row["peak_bytes"]) if floor else "",
                )  # fmt: skip
    console.print(table)
    show_notes(result)


def stream(
    size: Size = "1.3b",
    folder: Folder = CACHE,
    shares: Annotated[str, typer.Option(help="Resident shares of the expert bytes, by commas.")] = "0.25,0.5,0.75",
    peers: Annotated[str, typer.Option(help="moesaic, llama.cpp, accelerate.")] = "moesaic,llama.cpp,accelerate",
    policies: Annotated[str, typer.Option(help="Cache policies of ours, by commas.")] = "lru",
    steps: Annotated[int, typer.Option(help="Tokens measured.")] = 64,
    threads: Threads = 2,
    llama_python: LlamaPython = sys.executable,
    out: Out = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """A generated Qwen3-MoE in limited memory, from cold disk: ours beside accelerate's offload and llama.cpp's mmap."""
    from moesaic.bench import stream as bench

    try:
        parts = tuple(float(word) for word in words(shares))
    except ValueError:
        raise BadInput(f"--shares {shares!r}: numbers by commas") from None
    options = bench.Options(
        folder.expanduser(), size, parts, words(peers), words(policies), threads, steps=steps, llama_python=llama_python
    )
    result = measured("stream", partial(bench.run, options), out, json)
    if result is None:
        return
    _show_machine(result)
    table = figures("", "tok/s", "ms", "hit %", "MB/tok", "of floor", "peak", "exact")
    share = None
    for row in result["rows"]:
        if share != (share := row["share"]):
            table.add_section()
            table.add_row(f"[bold]{share:.0%} resident[/bold]")
        table.add_row(
            f"  {row['impl']}", f"{row['tokens_per_second']:,.2f}", f"{row['seconds'] * 1e3:,.0f}",
            f"{row['hit_rate']:.1%}" if "hit_rate" in row else "",
            f"{row['read_bytes_per_token'] / 1e6:,.1f}" if "hit_rate" in row else "",
            f"{row['of_floor']:.2f}" if "of_floor" in row else "",
            show_bytes(row["peak_bytes"]) if "peak_bytes" in row else "",
            {True: "yes", False: "NO"}.get(row.get("exact"), ""),
        )  # fmt: skip
    console.print(table)
    console.print(
        f"disk: {result['disk_bytes_per_second'] / 1e9:.2f} GB/s in reads of one matrix. of floor: bytes missed over that."
    )
    show_notes(result)


def soak(
    minutes: Annotated[float, typer.Option(help="How long.")] = 30.0,
    size: Size = "tiny",
    folder: Folder = CACHE,
    share: Annotated[float, typer.Option(help="Resident share of the expert bytes.")] = 0.25,
    policy: Annotated[str, typer.Option(help="Cache policy.")] = "lru",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    server: Annotated[bool, typer.Option(help="A real server and clients that come and go, instead of prompts.")] = False,
    model: Annotated[str, typer.Option(help="With --server: the model it serves.")] = "bundled",
    out: Out = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Stream a model for a long time, with prompts that change, and see whether its memory stays flat."""
    from moesaic.bench import soak, soak_server

    if server:
        served = soak_server.Options(model, minutes, share, policy, threads)
        result = measured("soak", partial(soak_server.run, served), out, json)
    else:
        options = soak.Options(folder.expanduser(), size, minutes, share, policy, threads)
        result = measured("soak", partial(soak.run, options), out, json)
    if result is None:
        return
    console.print(
        f"{result['minutes']:g} minutes, {result['requests']:,} requests, {result['tokens']:,} tokens, "
        f"{result['errors']} errors"
    )
    console.print(
        f"resident: {show_bytes(result['first_third_bytes'])} in the first third, "
        f"{show_bytes(result['last_third_bytes'])} in the last (medians), "
        f"{result['slope_mb_per_hour']:+,.1f} MB an hour over the last two thirds"
    )
    for error in result["first_errors"]:
        console.print(f"error: {error}")


def _show_machine(result: dict[str, Any]) -> None:
    header = result["machine"]
    console.print(
        f"{header['cpu']}, {header['threads']} threads; torch {header['torch']}; {result['size']}; load {header['load_before']}"
    )
