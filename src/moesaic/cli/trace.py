"""`moesaic trace MODEL --data PATH -o FILE.moetrace`: record which experts every token of a text chooses."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from moesaic.cli import options
from moesaic.cli.common import Debug, Json, console, emit, facts_grid, progress_console, single
from moesaic.cli.loading import open_model
from moesaic.core.errors import BadInput


def trace(
    model: options.Model = "bundled",
    data: options.Data = "",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The .moetrace to write.")] = None,
    max_bytes: options.MaxBytes = None,
    seed: Annotated[int | None, typer.Option(help="Sample documents (--max-bytes) and tokens (--generate).")] = None,
    context: options.Context = None,
    batch_size: options.BatchSize = None,
    generate: Annotated[
        int, typer.Option(help="Let the model write so many tokens after the first --prompt-tokens of each document.")
    ] = 0,
    prompt_tokens: Annotated[int, typer.Option(help="With --generate: tokens of each document to begin from.")] = 64,
    temperature: Annotated[float, typer.Option(help="With --generate: 0 takes the likeliest token.")] = 0.7,
    weights: Annotated[bool, typer.Option("--weights/--no-weights", help="Keep the routing weights.")] = True,
    logits: Annotated[bool, typer.Option("--logits", help="Keep the raw router scores.")] = False,
    lookahead: Annotated[int, typer.Option(help="Keep what the routers of so many further layers foresee.")] = 0,
    hidden: Annotated[float, typer.Option(help="Share of tokens whose router inputs are kept.")] = 0.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in the file of an interrupted recording.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Record the routing of a text: one small file for `analyze`, `replay`, `report` and everything that reads traces."""
    options.check_text(data, max_bytes, batch_size, threads)
    if generate < 0 or prompt_tokens < 1:
        raise BadInput("--generate and --prompt-tokens count tokens: they cannot be negative, nor the prompt empty")
    if out is None:
        raise BadInput("--out is missing: name the file to write, such as -o routing.moetrace")
    if resume and generate:
        raise BadInput("--resume goes with plain text; a recording with --generate is begun anew (--overwrite)")
    from moesaic.core.documents import read_documents, select
    from moesaic.trace import corpus
    from moesaic.trace import trace as record

    documents = select(read_documents(data), max_bytes, seed)
    options.use_threads(threads)
    opened = open_model(model, dtype, trust_remote_code=trust_remote_code)
    loaded, tokenizer = opened.model, opened.tokenizer
    length = corpus.context_of(loaded.config, context)
    found = list(corpus.pieces(documents, tokenizer, length))
    if not found:
        raise BadInput(f"{data} holds no text to trace")
    recorder = record(
        loaded, out, tokenizer=tokenizer, weights=weights, logits=logits, lookahead=lookahead, hidden=hidden,
        source=data, name=model, overwrite=overwrite, resume=resume,
    )  # fmt: skip
    extra = recorder.writer.extra
    settings = {"context": length, "pieces": len(found)}
    first = int(extra.get("pieces_done", 0)) if resume else 0
    if resume and {name: extra.get(name) for name in settings} != settings:
        raise BadInput(f"{out} was begun with other text or another --context: resume it with the same")
    if resume and first == len(found):
        raise BadInput(f"{out} is complete: there is nothing to resume")
    extra.update(settings)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    size = batch_size or corpus.batch_size(loaded, length)
    began = time.perf_counter()
    columns = (TextColumn("tracing"), BarColumn(), TextColumn("{task.completed:,.0f} / {task.total:,.0f} tokens"))
    with recorder, Progress(*columns, TimeRemainingColumn(), console=progress_console, transient=True) as bar:
        if generate:
            _generate(loaded, tokenizer, found, recorder, bar, generate, min(prompt_tokens, length - 1), temperature, seed or 0)
        else:
            _read(loaded, found, recorder, bar, size, pad, first)
    seconds = time.perf_counter() - began
    _show(recorder, out, seconds, json)


def _read(model: Any, found: list, recorder: Any, bar: Any, size: int, pad: int, first: int) -> None:
    """Plain forward passes; the file always says how far it holds the text."""
    from moesaic.trace import corpus

    extra, done = recorder.writer.extra, first
    task = bar.add_task("tracing", total=sum(len(piece.ids) for piece in found), completed=recorder.tokens)

    def before(batch: corpus.Batch) -> None:
        recorder.domain = batch.domains
        extra["pieces_done"] = batch.pieces  # whatever is flushed from now on holds this batch

    def after(batch: corpus.Batch) -> None:
        nonlocal done
        done = batch.pieces
        bar.update(task, completed=recorder.tokens)

    try:
        corpus.read(model, found, size=size, pad=pad, first=first, before=before, after=after)
    except BaseException:
        extra["pieces_done"] = done
        raise


def _generate(
    model: Any, tokenizer: Any, found: list, recorder: Any, bar: Any, new: int, prompt: int, temperature: float, seed: int
) -> None:
    """A request per document: its first tokens are the prompt, the model goes on."""
    from moesaic.trace import corpus

    firsts = {piece.document: piece for piece in reversed(found)}
    task = bar.add_task("tracing", total=sum(min(prompt, len(piece.ids)) + new for piece in firsts.values()))
    for number, piece in sorted(firsts.items()):
        recorder.domain = piece.domain
        corpus.write_on(
            model, piece.ids[:prompt], new, seed=seed + number, temperature=temperature,
            pad=tokenizer.pad_token_id or 0, end=tokenizer.eos_token_id,
        )  # fmt: skip
        bar.update(task, completed=recorder.tokens)


def _show(recorder: Any, out: Path, seconds: float, json: bool) -> None:
    result = recorder.result
    if result is None:
        raise BadInput("the model ran, but none of its MoE layers did: nothing was recorded")
    facts = {
        "file": str(out),
        "tokens": len(result),
        "sequences": len(result.domain_S),
        "layers": len(result.layers),
        "choices": result.choices,
        "file_bytes": out.stat().st_size,
        "seconds": seconds,
        "overhead": recorder.seconds / max(seconds - recorder.seconds, 1e-9),
    }
    if json:
        emit(facts)
        return
    table = facts_grid()
    table.add_row("file", f"{out}, {facts['file_bytes'] / 1e6:,.2f} MB")
    table.add_row("tokens", f"{facts['tokens']:,} in {facts['sequences']:,} sequences, {len(result.domains)} domains")
    table.add_row("choices", f"{facts['choices']:,} at {facts['layers']} layers")
    table.add_row("bytes", f"{facts['file_bytes'] / facts['choices']:.2f} per choice, all columns")
    table.add_row("time", f"{seconds:,.1f} s; recording took {recorder.seconds:,.2f} s, {facts['overhead']:.1%} of the rest")
    console.print(table)


app = single(trace)
