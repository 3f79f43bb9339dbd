"""`moesaic traces`: show a routing trace, merge several, take out a part, convert to and from other formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.common import Debug, Json, console, emit, facts_grid
from moesaic.core.errors import BadInput

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)

Out = Annotated[Path | None, typer.Option("--out", "-o", help="The file to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]


@app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="A .moetrace.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """What a trace is of and what it holds."""
    from moesaic.trace import open_trace

    trace = open_trace(file).check()
    header = trace.header
    facts = {
        "file": str(file),
        "model": header.model,
        "architecture": header.architecture,
        "source": header.source,
        "tokens": len(trace),
        "sequences": len(trace.domain_S),
        "layers": len(trace.layers),
        "experts": sorted({layer.experts for layer in trace.layers}),
        "top_k": trace.top_k,
        "choices": trace.choices,
        "domains": {name: int((trace.domain_T == i).sum()) for i, name in enumerate(trace.domains)},
        "columns": {name: list(column.shape) for name, column in trace.columns.items()},
        "file_bytes": file.stat().st_size,
        "lost_bytes": trace.lost_bytes,
    }
    if json:
        emit(facts)
        return
    table = facts_grid()
    table.add_row("model", f"{header.model or 'not named'} ({header.architecture or 'architecture not named'})")
    table.add_row("text", header.source or "not named")
    experts = ", ".join(map(str, facts["experts"]))
    table.add_row("layers", f"{facts['layers']} of {experts} experts, up to {trace.top_k} per token")
    table.add_row("tokens", f"{len(trace):,} in {facts['sequences']:,} sequences; {facts['choices']:,} choices")
    if trace.domains:
        table.add_row("domains", ", ".join(f"{name} {count:,}" for name, count in facts["domains"].items()))
    table.add_row("columns", ", ".join(f"{name} {shape}" for name, shape in facts["columns"].items()))
    if trace.lost_bytes:
        table.add_row("cut off", f"an unfinished end of {trace.lost_bytes:,} bytes was left out")
    console.print(table)


@app.command("merge")
def merge(
    files: Annotated[list[Path], typer.Argument(help="Traces of one model, in order.")],
    out: Out = None,
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Several traces of one model as one."""
    from moesaic.trace import edit, open_trace

    target = _target(out, overwrite, files)
    _written(edit.save(edit.merge([open_trace(file) for file in files]), target), target, json)


@app.command("slice")
def slice_(
    file: Annotated[Path, typer.Argument(help="A .moetrace.")],
    out: Out = None,
    domain: Annotated[list[str] | None, typer.Option(help="Keep this domain; may be given several times.")] = None,
    sequences: Annotated[str, typer.Option(help="Keep these sequences: 3 or 10:20, separated by commas.")] = "",
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Some domains or sequences of a trace as one of their own."""
    from moesaic.trace import edit, open_trace

    target = _target(out, overwrite, [file])
    trace = open_trace(file)
    part = edit.select(trace, _numbers(sequences, len(trace.domain_S)) if sequences else None, domain)
    if not len(part):
        raise BadInput(f"nothing of {file} is left: no sequence is both in --sequences and --domain")
    _written(edit.save(part, target), target, json)


@app.command("convert")
def convert(
    file: Annotated[Path, typer.Argument(help="A .moetrace, .npz or .parquet.")],
    out: Out = None,
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Between .moetrace, .npz (NumPy) and .parquet (a row per token and layer), by the files' endings."""
    from moesaic.trace import convert as formats
    from moesaic.trace import edit, open_trace

    target = _target(out, overwrite, [file])
    readers: dict[str, Callable[[Path], Any]] = {
        ".moetrace": open_trace,
        ".npz": formats.from_npz,
        ".parquet": formats.from_parquet,
    }
    writers: dict[str, Callable[[Any, Path], Any]] = {
        ".moetrace": edit.save,
        ".npz": formats.to_npz,
        ".parquet": formats.to_parquet,
    }
    for path in (file, target):
        if path.suffix not in readers:
            raise BadInput(f"{path}: the ending says the format; one of {', '.join(readers)}")
    if not file.is_file():
        raise BadInput(f"no such file: {file}")
    trace = readers[file.suffix](file)
    writers[target.suffix](trace, target)
    _written(trace, target, json)


def _target(out: Path | None, overwrite: bool, sources: list[Path]) -> Path:
    if out is None:
        raise BadInput("--out is missing: name the file to write")
    if out.exists() and (not overwrite or out.resolve() in [source.resolve() for source in sources]):
        raise BadInput(f"{out} exists: name another file, or pass --overwrite (never onto the file that is read)")
    return out


def _numbers(text: str, count: int) -> list[int]:
    found: list[int] = []
    for word in text.split(","):
        first, colon, last = word.strip().partition(":")
        try:
            start = int(first) if first else 0
            found += range(start, int(last) if last else count) if colon else [start]
        except ValueError:
            raise BadInput(f"--sequences {text!r}: numbers or ranges such as 10:20, separated by commas") from None
    return found


def _written(trace: Any, target: Path, json: bool) -> None:
    facts = {
        "file": str(target),
        "tokens": len(trace),
        "sequences": len(trace.domain_S),
        "layers": len(trace.layers),
        "choices": trace.choices,
        "file_bytes": target.stat().st_size,
    }
    if json:
        emit(facts)
    else:
        console.print(
            f"{target}: {facts['tokens']:,} tokens in {facts['sequences']:,} sequences, {facts['file_bytes']:,} bytes"
        )
