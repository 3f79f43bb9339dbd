"""`moesaic report FILE`: a routing trace in pictures, one HTML page that works offline."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.common import Debug, Json, console, emit, progress_console, single
from moesaic.core.errors import BadInput

SHARES = "0.1,0.25,0.4,0.55,0.7,0.85,1"


def report(
    file: Annotated[Path, typer.Argument(help="A .moetrace that `moesaic trace` recorded.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page; default: the trace's name with .html.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The model whose tokenizer reads the text; default: the one the trace names.")
    ] = None,
    policies: Annotated[str, typer.Option(help="Cache policies to replay for the page, by commas; none: leave them out.")] = (
        "lru,lfu,static,belady"
    ),
    shares: Annotated[str, typer.Option(help="Cache sizes to replay, as shares of all experts.")] = SHARES,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the page: loads, domains, tokens, pairs of experts, flows between layers, cache curves, coloured texts."""
    from moesaic.core.files import check_writable, write_atomically
    from moesaic.report import trace_page
    from moesaic.trace import open_trace

    began = time.perf_counter()
    trace = open_trace(file).check()
    page = out or file.with_suffix(".html")
    if page.resolve() == file.resolve():
        raise BadInput(f"--out {page}: is the trace itself; name the page")
    check_writable(page)
    texts, words = reader(model, trace)
    with progress_console.status("") as status:
        rows = _replayed(trace, policies, shares, lambda what: status.update(f"replaying {what}"))
        data = trace_page.gather(trace, texts, rows, lambda what: status.update(f"measuring {what}"))
    header = trace.header
    data["intro"] = words
    facts = [
        ("model", header.architecture or "not named"),
        ("text", header.source or "not named"),
        ("tokens", f"{len(trace):,} in {len(trace.domain_S):,} sequences"),
        ("choices", f"{trace.choices:,}"),
        ("layers", f"{len(trace.layers)} of {trace.num_experts} experts, top {trace.top_k}"),
        ("domains", f"{len(trace.domains)}" if trace.domains else "not named"),
    ]
    made = f"Made on {datetime.now():%Y-%m-%d} in {time.perf_counter() - began:,.0f} s from {file.name} with"
    command = "moesaic report " + " ".join(shlex.quote(word) for word in sys.argv[2:]) if sys.argv[1:2] == ["report"] else (
        f"moesaic report {shlex.quote(str(file))}"
    )  # fmt: skip
    title = Path(header.model).name if header.model else file.stem
    write_atomically(page, trace_page.html(data, f"routing of {title}", facts, made, command))
    result = {
        "page": str(page),
        "file": str(file),
        "tokens": len(trace),
        "choices": trace.choices,
        "page_bytes": page.stat().st_size,
        "texts": texts is not None,
        "seconds": time.perf_counter() - began,
    }
    if json:
        emit(result)
    else:
        console.print(f"{page}: {result['page_bytes'] / 1e6:,.2f} MB in {result['seconds']:,.1f} s")
        if texts is None:
            console.print(words)


def reader(model: str | None, trace: Any) -> tuple[Callable[[list[int]], list[str]] | None, str]:
    """Token ids to texts, and what the page says of it. Raises BadInput where --model names another vocabulary."""
    from moesaic.serving.stream import token_texts
    from moesaic.trace.recorder import fingerprint
    from moesaic.view.load import load_tokenizer

    name = model or trace.header.model
    if trace.tokens_T is None:
        return None, "The trace holds no token ids, so texts cannot be shown."
    if not name:
        return None, "The trace does not name its model: pass --model to show texts instead of token numbers."
    try:
        tokenizer = load_tokenizer(name)
    except BadInput:
        if model is not None:
            raise
        return None, f"The model {name} is not here: pass --model to show texts instead of token numbers."
    held = trace.header.tokenizer
    if held and fingerprint(tokenizer) != held:
        if model is not None:
            raise BadInput(f"--model {model}: its tokenizer is not the one that {trace.name} was recorded with")
        return None, f"The tokenizer of {name} has changed since the trace was recorded, so texts are not shown."
    return lambda ids: token_texts(tokenizer, ids), ""


def _replayed(trace: Any, policies: str, shares: str, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    if policies.strip() in ("", "none") or not trace.bytes_L.all():
        return []
    from moesaic.trace.hardware import Hardware
    from moesaic.trace.replay import shape_of
    from moesaic.trace.sweep import sweep

    try:
        wanted = [float(word) for word in shares.split(",")]
    except ValueError:
        raise BadInput(f"--shares {shares!r}: numbers from 0 to 1, separated by commas") from None
    if not all(0 < share <= 1 for share in wanted):
        raise BadInput(f"--shares {shares!r}: numbers above 0 and up to 1")
    total = shape_of(trace).total_bytes
    sizes = [max(1, round(total * share)) for share in wanted]
    return sweep(trace, policies, sizes, Hardware(), as_decode=True, progress=lambda name, *_: progress(name))


app = single(report)
