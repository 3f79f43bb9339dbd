"""`moesaic bench NAME`: ours, every peer that can run, and the floor, in turn."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from moesaic.cli import (
    bench_compression,
    bench_gpu,
    bench_models,
    bench_routing,
    bench_steering,
    bench_surgery,
    bench_unlearn,
    bench_upcycle,
)
from moesaic.cli.bench_common import figures, measured, show_notes, words
from moesaic.cli.common import Debug, Json, console, emit, keep, progress_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)
app.command("decode")(bench_models.decode)
app.command("stream")(bench_models.stream)
app.command("stream-gpu")(bench_gpu.stream_gpu)
app.command("soak")(bench_models.soak)
app.command("routing")(bench_routing.routing)
app.command("steering")(bench_steering.steering)
app.command("compression")(bench_compression.compression)
app.command("surgery")(bench_surgery.surgery)
app.command("unlearn")(bench_unlearn.unlearn)
app.command("upcycle")(bench_upcycle.upcycle)


@app.command("layer")
def layer(
    tokens: Annotated[str, typer.Option(help="Numbers of tokens T, separated by commas.")] = "1,4,16,64,512",
    width: Annotated[int, typer.Option("--width", "-D", help="Model width D.")] = 1024,
    inner: Annotated[int, typer.Option("--inner", "-I", help="Expert inner width I.")] = 512,
    experts: Annotated[int, typer.Option("--experts", "-E", help="Experts E.")] = 64,
    slots: Annotated[int, typer.Option("--slots", "-K", help="Experts per token K.")] = 8,
    dtypes: Annotated[str, typer.Option(help="Weights: bf16, fp32, int8, int4.")] = "bf16,fp32,int8,int4",
    routings: Annotated[str, typer.Option(help="uniform, zipf (1.0), real (OLMoE's recorded loads).")] = "uniform,zipf,real",
    routing_data: Annotated[Path, typer.Option(help="Folder with olmoe-counts.npz.")] = Path("../shared/data/routing"),
    train: Annotated[bool, typer.Option("--train", help="Forward and backward instead of inference.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    shapes: Annotated[bool, typer.Option(help="The published GPU shapes instead of -D -I -E -K; default on cuda.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of each case, at most.")] = 40,
    seconds: Annotated[float, typer.Option(help="Time for each case, about.")] = 3.0,
    quick: Annotated[bool, typer.Option("--quick", help="T 1, 16 and 512, bf16, uniform, few rounds.")] = False,
    against: Annotated[str | None, typer.Option(help="Run the same at this git revision too.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """One MoE layer: every kernel of ours, transformers' implementations, kt-kernel and ScatterMoE where installed."""
    import torch

    from moesaic.bench import layer as bench
    from moesaic.bench.runner import at_revision
    from moesaic.core.errors import BadInput

    if threads:
        torch.set_num_threads(threads)
    try:
        counts = tuple(int(word) for word in words(tokens))
    except ValueError:
        raise BadInput(f"--tokens {tokens!r}: numbers separated by commas") from None
    options = bench.Options(
        counts, width, inner, experts, slots, words(dtypes), words(routings), train, device, rounds, seconds
    )
    options.routing_data, options.shapes = routing_data, shapes or torch.device(device).type == "cuda"
    if quick:
        options.tokens, options.dtypes, options.routings = (1, 16, 512), ("bf16",), ("uniform",)
        options.rounds, options.seconds = 12, 1.5
    with progress_console.status("") as status:
        result = bench.run(options, lambda text: status.update(f"bench layer: {text}"))
        if against:
            status.update(f"bench layer: at {against}")
            theirs = at_revision(against, _arguments(options, threads))
            _merge(result, theirs, against)
    keep(result, out)
    if json:
        emit(result)
    else:
        _show_layer(result, against)


@app.command("machine")
def machine(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Measure the disk that holds this folder.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small and rough; nothing is kept.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Memory, matmul and disk speeds; kept in the cache folder, where the other benchmarks find their floors."""
    import torch

    from moesaic.bench import machine as bench
    from moesaic.core.errors import BadInput

    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: no CUDA device on this machine")
    if folder is not None and not folder.is_dir():
        raise BadInput(f"--folder {folder}: no such folder")
    if threads:
        torch.set_num_threads(threads)
    with progress_console.status("bench machine"):
        profile = bench.measure(device, quick, folder)
    path = None if quick else str(bench.save(profile, device))
    header = bench.describe(device)
    rows = [{"impl": "machine", "quantity": name, "value": value, "error": None} for name, value in profile.items()]
    if json:
        emit({"machine": header, "rows": rows, "profile": path})
        return
    table = Table(title=f"{header.get('gpu') or header['cpu']}, {header['threads']} threads, torch {header['torch']}")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    for name, value in profile.items():
        unit = "GFLOP/s" if name.endswith("flops") else "GB/s"
        table.add_row(name.removesuffix("_bytes_per_second"), "not measured" if value is None else f"{value / 1e9:,.1f} {unit}")
    console.print(table)
    if path:
        console.print(f"kept in {path}")


@app.command("trace")
def trace(
    cases: Annotated[str, typer.Option(help="Models: bundled, k8 (generated, 64 experts, 8 per token).")] = "bundled,k8",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of each case, at most.")] = 60,
    seconds: Annotated[float, typer.Option(help="Time for each case, about.")] = 40.0,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Recording routing: overhead of the forward pass, bytes per choice beside JSON lines, time to open 10^8 choices."""
    import torch

    from moesaic.bench import trace as bench
    from moesaic.cli.loading import quiet_transformers

    if threads:
        torch.set_num_threads(threads)
    quiet_transformers()
    options = bench.Options(rounds, seconds, device, words(cases))
    result = measured("trace", partial(bench.run, options), out, json)
    if result is not None:
        _show_trace(result)


def _show_trace(result: dict[str, Any]) -> None:
    header = result["machine"]
    console.print(f"{header['cpu']}, {header['threads']} threads; torch {header['torch']}; load {header['load_before']}")
    table = figures("", "ms", "spread", "overhead", "B/choice", "JSON")
    case = None
    for row in result["rows"]:
        if case != (case := ", ".join(str(row[key]) for key in ("model", "case") if row[key])):
            table.add_section()
            table.add_row(f"[bold]{case}[/bold]")
        table.add_row(
            row["impl"],
            "" if row["seconds"] is None else f"{row['seconds'] * 1e3:,.1f}",
            f"{row['spread']:.1%}" if "spread" in row else "",
            f"{row['overhead']:+.1%}" if "overhead" in row else "",
            f"{row['bytes_per_choice']:.2f}" if "bytes_per_choice" in row else "",
            f"{row['smaller_than_jsonl']:.1f}x" if "smaller_than_jsonl" in row else "",
        )
    console.print(table)


def _arguments(options: Any, threads: int | None) -> list[str]:
    """The command line that repeats these options elsewhere."""
    given = {
        "--tokens": ",".join(map(str, options.tokens)),
        "-D": options.width,
        "-I": options.inner,
        "-E": options.experts,
        "-K": options.slots,
        "--dtypes": ",".join(options.dtypes),
        "--routings": ",".join(options.routings),
        "--routing-data": options.routing_data.resolve(),
        "--device": options.device,
        "--rounds": options.rounds,
        "--seconds": options.seconds,
    }
    words = ["layer", *(str(word) for pair in given.items() for word in pair)]
    words += ["--train"] * options.train + ["--shapes"] * options.shapes
    return words + (["--threads", str(threads)] if threads else [])


_CASE = ("impl", "shape", "T", "dtype", "routing")


def _merge(result: dict[str, Any], theirs: dict[str, Any], revision: str) -> None:
    """Put the other revision's seconds beside ours, case by case."""
    before = {tuple(row.get(key) for key in _CASE): row["seconds"] for row in theirs["rows"]}
    result["against"] = revision
    for row in result["rows"]:
        row["seconds_against"] = before.get(tuple(row[key] for key in _CASE))


def _show_layer(result: dict[str, Any], against: str | None) -> None:
    header = result["machine"]
    where = header.get("gpu") or f"{header['cpu']}, {header['threads']} threads, {' '.join(header['features'])}"
    console.print(f"{where}; torch {header['torch']}, transformers {header['transformers']}; load {header['load_before']}")
    columns = ("ms", "min", "floor", "/floor", "vs gmm", "error", *(["before"] if against else []))
    table = figures("case, implementation", *columns)
    memory = any("peak_activation_bytes" in row for row in result["rows"])
    if memory:
        table.add_column("memory", justify="right")
    last = None
    for row in result["rows"]:
        case = " ".join(str(word) for word in (row["shape"], f"T {row['T']}", row["routing"]) if word)
        case += ", train" if row["train"] else ""
        if case != last:
            table.add_section()
            table.add_row(f"[bold]{case}[/bold]")
        last = case
        name = row["impl"] if row["impl"].endswith(row["dtype"]) else f"{row['impl']} {row['dtype']}"
        ratio, before = row["ratio_to_grouped_mm"], row.get("seconds_against")
        cells = [
            f"  [bold cyan]{name}[/bold cyan]" if name.startswith("moesaic") else f"  {name}",
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['seconds_min'] * 1e3:.2f}",
            f"{row['floor_seconds'] * 1e3:.2f}",
            f"{row['seconds'] / row['floor_seconds']:.1f}",
            "" if ratio is None else f"{ratio:.2f}",
            f"{row['error']:.0e}",
        ]
        if against:
            cells.append("" if before is None else f"{before * 1e3:.2f}")
        if memory:
            cells.append(f"{row.get('peak_activation_bytes', 0) / 2**20:,.0f} MiB")
        table.add_row(*cells)
    console.print(table)
    console.print("ms: median of interleaved rounds. /floor: over the least time this machine allows.")
    console.print("vs gmm: times as fast as transformers' grouped_mm in the same rounds. error: against fp32.")
    if against:
        console.print(f"before: ms at {against}")
    show_notes(result)
