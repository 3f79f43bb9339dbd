"""`moesaic analyze FILE`: the statistics of a routing trace, and what they say about streaming the model."""

from __future__ import annotations

import time
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.common import Debug, Json, console, emit, progress_console, single
from moesaic.core.errors import BadInput

TWO_TRACES = "saturation"


def analyze(
    file: Annotated[Path, typer.Argument(help="A .moetrace; or an .npz of counts, DOMAIN.counts [L, E] and DOMAIN.pairs.")],
    only: Annotated[str, typer.Option(help="Measures to take, with commas between: srp,load. Default: all.")] = "",
    against: Annotated[Path | None, typer.Option(help="Trace of another checkpoint on the same text: saturation.")] = None,
    by_domain: Annotated[bool, typer.Option("--by-domain", help="Also the load of every domain.")] = False,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples behind the intervals; 0: none.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of resampling and of random baselines.")] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Load, balance, locality (SRP, SCH, reuse), affinity and specialisation of a routing trace."""
    if resamples < 0:
        raise BadInput(f"--resamples {resamples}: must be at least 0")
    if file.suffix == ".npz":
        _tables(file, json)
        return
    from moesaic.core.registry import entries
    from moesaic.trace.file import open_trace

    known = [entry.name for entry in entries("statistics")]
    names = _names(only, known, against)
    started = time.perf_counter()
    trace = open_trace(file).check()
    other = open_trace(against).check() if against else None
    options = {"resamples": resamples, "seed": seed, "by_domain": by_domain}
    with progress_console.status("reading the trace") as status:
        found: dict[str, Any] = {}
        skipped: dict[str, str] = {}
        for name in names:
            status.update(f"measuring {name}")
            result = measure(name, trace, other, options, required=bool(only))
            if isinstance(result, str):
                skipped[name] = result
            else:
                found[name] = result
    seconds = time.perf_counter() - started
    if json:
        emit(document(trace, found, skipped, seconds))
    else:
        from moesaic.cli.analyze_text import render

        for part in render(trace, found, skipped, seconds):
            console.print(part)


def _tables(file: Path, json: bool) -> None:
    from moesaic.cli import analyze_tables

    if not file.is_file():
        raise BadInput(f"no such file: {file}")
    found = analyze_tables.document(file)
    if json:
        emit(found)
        return
    for table in analyze_tables.render(found):
        console.print(table)


def _names(only: str, known: list[str], against: Path | None) -> list[str]:
    if not only:
        return [name for name in known if name != TWO_TRACES or against]
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise BadInput(f"--only {name}: no such measure; one of {', '.join(known)}")
    if TWO_TRACES in names and against is None:
        raise BadInput(f"--only {TWO_TRACES} compares two checkpoints: name the other trace with --against")
    return names + ([TWO_TRACES] if against and TWO_TRACES not in names else [])


def measure(name: str, trace: Any, other: Any, options: dict[str, Any], required: bool) -> Any:
    """The measure's result, or why this trace has nothing for it."""
    from moesaic.core.registry import get
    from moesaic.trace.statistics.result import NotRecorded

    build = get("statistics", name).build
    taken = {key: value for key, value in options.items() if key in signature(build).parameters}
    try:
        return build(trace, other, **taken) if name == TWO_TRACES else build(trace, **taken)
    except NotRecorded as error:
        if required:
            raise
        return str(error)


def document(trace: Any, found: dict[str, Any], skipped: dict[str, str], seconds: float) -> dict[str, Any]:
    """The command's JSON object: what the trace is of, a row per layer, and each measure's summary under its name."""
    layers = [{"name": layer.name, "experts": layer.experts, "top_k": layer.top_k} for layer in trace.layers]
    for result in found.values():
        for row, more in zip(layers, result.by_layer(), strict=False):
            row.update(more)
    return {
        "file": str(trace.path),
        "model": trace.header.model,
        "tokens": len(trace),
        "sequences": len(trace.domain_S),
        "choices": trace.choices,
        "domains": list(trace.domains),
        "layers": layers,
        **{name: result.summary() for name, result in found.items()},
        "skipped": skipped,
        "seconds": round(seconds, 3),
    }


app = single(analyze)
