"""`moesaic replay FILE`: what a cache of experts would do on a recorded trace, under one policy or all of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moesaic.cli.common import Debug, Json, console, emit, keep, progress_console, single
from moesaic.core.errors import BadInput
from moesaic.core.sizes import parse_bytes, parse_rate, show_bytes

NARROW = (0, 3, 5, 6, 7, 8)
"""Columns of figures for a terminal of 80 characters."""
STANDARD = tuple(f"{share}%" for share in range(10, 101, 10))


def replay(
    file: Annotated[Path, typer.Argument(help="A .moetrace that `moesaic trace` recorded.")],
    cache: Annotated[
        list[str] | None, typer.Option(help="4GiB, 40% or 0.4 of all experts; several, or by commas. Default: 10% to 100%.")
    ] = None,
    policy: Annotated[str, typer.Option(help="Names by commas, or all; name:option=value+option=value.")] = "lru",
    as_decode: Annotated[
        bool, typer.Option("--as-decode", help="One token per pass, sequence by sequence, though recorded in longer passes.")
    ] = False,
    batch: Annotated[int, typer.Option(help="So many requests at a time, together; 0: as recorded.")] = 0,
    expert_bytes: Annotated[str | None, typer.Option(help="Pretend that an expert has this size, such as 6MiB.")] = None,
    learn_from: Annotated[
        Path | None, typer.Option(help="Trace from which policies that learn do; default: --learn-share.")
    ] = None,
    learn_share: Annotated[
        float | None,
        typer.Option(
            help="Share to learn from, then not replayed (default 0.2 if a policy learns; 1: learn from what is replayed)."
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(help="A profile file, or stated: pcie3, pcie4, pcie5, nvme. Default: what is kept, else pcie4."),
    ] = None,
    bandwidth: Annotated[str | None, typer.Option(help="Of the link that a miss crosses, such as 25GB/s.")] = None,
    device_bandwidth: Annotated[str | None, typer.Option(help="Of the memory that computes cached experts.")] = None,
    host_bandwidth: Annotated[str | None, typer.Option(help="Of the memory of a host that can compute misses.")] = None,
    host_flops: Annotated[float | None, typer.Option(help="FLOP/s of that host; 0: it cannot.")] = None,
    resident_bytes: Annotated[
        str | None, typer.Option(help="Bytes of the model outside its experts, if not the trace's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Simulate expert caches on a trace: hits, bytes moved, stalls, tokens per second."""
    from moesaic.trace.file import open_trace
    from moesaic.trace.replay import shape_of
    from moesaic.trace.sweep import sweep

    if learn_share is not None and not 0 <= learn_share <= 1:
        raise BadInput(f"--learn-share {learn_share}: must be between 0 and 1")
    if learn_share is not None and learn_from is not None:
        raise BadInput(f"--learn-share {learn_share} and --learn-from {learn_from}: choose one")
    if batch < 0:
        raise BadInput(f"--batch {batch}: must be 0 or more")
    trace = open_trace(file).check()
    size = None if expert_bytes is None else parse_bytes(expert_bytes, "--expert-bytes")
    if size is not None and size < 1:
        raise BadInput(f"--expert-bytes {expert_bytes!r}: must be at least 1")
    shape = shape_of(trace, size)
    capacities = [_capacity(word, shape.total_bytes) for text in (cache or STANDARD) for word in text.split(",")]
    machine = _hardware(hardware).with_(
        link_bytes_per_second=None if bandwidth is None else parse_rate(bandwidth, "--bandwidth"),
        device_bytes_per_second=None if device_bandwidth is None else parse_rate(device_bandwidth, "--device-bandwidth"),
        host_bytes_per_second=None if host_bandwidth is None else parse_rate(host_bandwidth, "--host-bandwidth"),
        host_flops=host_flops,
    )
    quiet = not progress_console.is_terminal
    columns = (TextColumn("replay {task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} tokens"))
    with Progress(*columns, TimeRemainingColumn(), console=progress_console, transient=True, disable=quiet) as bar:
        task = bar.add_task("(the first use compiles: half a minute)", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        rows = sweep(
            trace,
            policy,
            capacities,
            machine,
            as_decode=as_decode,
            batch=batch,
            expert_bytes=size,
            resident_bytes=None if resident_bytes is None else parse_bytes(resident_bytes, "--resident-bytes"),
            learn_from=None if learn_from is None else open_trace(learn_from).check(),
            learn_share=learn_share,
            progress=progress,
        )
    result: dict[str, Any] = {
        "file": str(file),
        "model": trace.header.model,
        "tokens": len(trace),
        "layers": len(trace.layers),
        "experts": trace.num_experts,
        "top_k": trace.top_k,
        "total_bytes": shape.total_bytes,
        "as_decode": as_decode,
        "hardware": machine.describe(),
        "rows": rows,
    }
    keep(result, out)
    if json:
        emit(result)
    else:
        _show(result)


def _capacity(word: str, total: int) -> int:
    """Bytes of `4GiB`, `40%` or `0.4`."""
    text = word.strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = math.inf
    if text.endswith("%") or share <= 1:
        if not 0 <= share <= 1:
            raise BadInput(f"--cache {word!r}: a share is between 0% and 100%")
        return math.ceil(share * total)
    return parse_bytes(text, "--cache")


def _hardware(name: str | None) -> Any:
    from moesaic.core import profiles
    from moesaic.trace.hardware import KNOWN, Hardware

    if name is None:
        path = profiles.newest()
        return KNOWN["pcie4"] if path is None else Hardware.of_profile(profiles.read(path), str(path))
    if name in KNOWN:
        return KNOWN[name]
    path = Path(name).expanduser()
    if not path.is_file():
        raise BadInput(f"--hardware {name!r}: no such file, and none of {', '.join(KNOWN)}")
    return Hardware.of_profile(profiles.read(path), str(path))


def _show(result: dict[str, Any]) -> None:
    machine = result["hardware"]
    host = f", host {machine['host_bytes_per_second'] / 1e9:,.0f} GB/s" if machine["host_flops"] else ", no host that computes"
    console.print(
        f"{result['file']}: {result['tokens']:,} tokens, {result['layers']} layers, {result['experts']} experts, "
        f"top {result['top_k']}, {show_bytes(result['total_bytes'])} of experts"
    )
    console.print(
        f"stated hardware {machine['name']}: link {machine['link_bytes_per_second'] / 1e9:,.2f} GB/s, "
        f"device {machine['device_bytes_per_second'] / 1e9:,.0f} GB/s and {machine['device_flops'] / 1e12:,.2f} TFLOP/s{host}"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("cache, policy", no_wrap=True)
    names = ("hit %", "strict", "warm", "moved/tok", "guessed", "wasted", "stall", "tok/s", "at most")
    shown = range(len(names)) if console.width >= 100 else NARROW
    for name in (names[i] for i in shown):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in result["rows"]:
        if row["cache_bytes"] != last:
            table.add_section()
            table.add_row(f"[bold]{row['cache_share']:.0%}, {show_bytes(row['cache_bytes'])}[/bold]")
        last = row["cache_bytes"]
        name = f"  {row['policy']}" + ("" if row["exact"] else "*")
        if row["reason"]:
            table.add_row(name, "-")
            continue
        cells = _cells(row)
        table.add_row(name, *(cells[i] for i in shown))
    console.print(table)
    for note in dict.fromkeys(
        f"{row['policy']}: {text}" for row in result["rows"] for text in [row["reason"], *row["notes"]] if text
    ):
        console.print(note)
    if any(not row["exact"] for row in result["rows"]):
        console.print("*: changes the model")
    console.print(
        "Per token: bytes moved, of them prefetched (guessed) and prefetched in vain (wasted). stall: share of the time. "
        "strict: first touches are misses. warm: those that found a free slot are hits. at most: what the link allows."
    )


def _cells(row: dict[str, Any]) -> list[str]:
    guessed = row["speculative_bytes_used"] + row["speculative_bytes_wasted"]
    per_token = row["moved_bytes_per_token"] / row["moved_bytes"] if row["moved_bytes"] else 0.0
    bound = row["bound_tokens_per_second"]
    return [
        *(f"{100 * row[key]:.1f}" for key in ("hit_rate", "strict_hit_rate", "warm_hit_rate")),
        show_bytes(row["moved_bytes_per_token"]),
        show_bytes(guessed * per_token) if guessed else "",
        show_bytes(row["speculative_bytes_wasted"] * per_token) if guessed else "",
        f"{row['stall_seconds'] / row['seconds']:.0%}" if row["seconds"] else "",
        f"{row['tokens_per_second']:,.1f}",
        "" if bound is None else f"{bound:,.1f}",
    ]


app = single(replay)
