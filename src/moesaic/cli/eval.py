"""`moesaic eval MODEL --data PATH`: bits per byte and perplexity per domain; `--efficiency`: what writing takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moesaic.cli import efficiency, options
from moesaic.cli.common import Debug, Json, console, emit, progress_console, single
from moesaic.cli.loading import open_model, open_streamed, streaming
from moesaic.core.documents import read_documents, select
from moesaic.core.errors import BadInput


def evaluate(
    model: options.Model = "bundled",
    data: options.Data = "",
    max_bytes: options.MaxBytes = None,
    context: Annotated[int | None, typer.Option(help="Longest input in tokens; default: the model's, at most 2048.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens scored per further window; default: half the context.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows per forward pass; default: as many as fit 256 MB.")] = None,
    dtype: options.Dtype = "auto",
    experts: options.Experts = "moesaic",
    quantize: Annotated[
        str | None, typer.Option(help="In few bits: int8, int4, int2, int4:group=32,linear=8, mixed:high=8,low=4,share=0.25.")
    ] = None,
    importance: Annotated[
        Path | None, typer.Option(help="For mixed: a .moetrace that tells how often experts are chosen; default: this text.")
    ] = None,
    memory: options.Memory = None,
    resident: options.Resident = None,
    policy: options.StreamPolicy = "lru",
    page_cache: options.PageCache = "direct",
    prefetch_bytes: options.PrefetchBytes = None,
    lossy: options.Lossy = None,
    seed: Annotated[int | None, typer.Option(help="With --max-bytes: sample documents with this seed.")] = None,
    compare_compressors: Annotated[bool, typer.Option(help="Also xz -9 and zstd -19 on each domain.")] = False,
    measure_efficiency: Annotated[
        bool,
        typer.Option("--efficiency", help="Memory, processor, latency, rate and power while it writes; --data is optional."),
    ] = False,
    against: Annotated[
        str | None, typer.Option(help="With --efficiency and --data: the model that this is a compressed form of.")
    ] = None,
    requests: Annotated[int, typer.Option(help="With --efficiency: prompts to answer.")] = 8,
    new_tokens: Annotated[int, typer.Option(help="With --efficiency: tokens of each answer.")] = 64,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Score documents: bits per byte (comparable across tokenizers), perplexity per token, per domain and overall."""
    efficiency.check(requests, new_tokens, against, data, measure_efficiency)
    options.check_text(data, max_bytes, batch_size, threads, optional=measure_efficiency)
    from moesaic.evaluation import bits_per_byte as bpb

    documents = select(read_documents(data), max_bytes, seed) if data else []
    options.use_threads(threads)
    if importance is not None and (quantize is None or not quantize.startswith("mixed")):
        raise BadInput("--importance says which experts get fewer bits: give --quantize mixed with it")
    streams = streaming(memory, resident, policy, page_cache, experts, lossy=lossy, prefetch_bytes=prefetch_bytes)
    if streams is not None and quantize is not None:
        raise BadInput(f"--quantize {quantize} needs all experts in memory: leave --memory and --resident out")
    streamed = None
    if streams is None:
        opened = open_model(model, dtype, experts=experts, dense_ok=True, trust_remote_code=trust_remote_code)
    else:
        opened, streamed = open_streamed(model, dtype, trust_remote_code=trust_remote_code, **streams)
    loaded, tokenizer, source = opened.model, opened.tokenizer, opened.source
    dtype_name = str(next(loaded.parameters()).dtype).removeprefix("torch.")
    quantized = None
    if quantize is not None:
        quantized = _quantize(loaded, tokenizer, quantize, importance, documents, context, batch_size)
    measured = None
    if measure_efficiency:  # before scoring, whose batches leave memory behind
        texts = [document.text for document in documents]
        measured = efficiency.measure(loaded, tokenizer, source, texts, requests, new_tokens, streamed)
        if streamed is not None:
            streamed.engine.clear()
    scores = _score(loaded, tokenizer, documents, context, stride, batch_size) if documents or measured is None else {}
    result: dict[str, Any] = bpb.report(model, scores) if scores else {"model": model}
    result["dtype"] = dtype_name
    if quantized is not None:
        result["quantized"] = quantized
    if streamed is not None:
        from moesaic.serving.streamed.describe import streaming_facts

        result |= {**streaming_facts(streamed), "exact": streamed.engine.exact}
    result["context"], result["stride"] = bpb.check_sizes(loaded.config, context, stride)
    if measured is not None:
        result["efficiency"] = measured
        if against is not None:
            how = {"dtype": dtype, "context": context, "stride": stride, "batch_size": batch_size}
            measured |= efficiency.compare(measured, result["bits_per_byte"], against, documents, **how)
    if compare_compressors:
        _add_compressors(result, scores)
    unpaid = sum(score.lossy_documents for score in scores.values())
    if unpaid:
        progress_console.print(
            f"[yellow]the tokenizer does not give back the text of {unpaid} documents: bits per byte is too low there[/yellow]"
        )
    if json:
        emit(result)
    else:
        if scores:
            console.print(_table(result, compare_compressors))
        if measured is not None:
            console.print(efficiency.table(measured))
        if streamed is not None:
            console.print(_streaming(result, streamed.engine.lossy), highlight=False)


def _score(
    model: Any, tokenizer: Any, documents: list[Any], context: int | None, stride: int | None, batch_size: int | None
) -> dict[str, Any]:
    from moesaic.evaluation import bits_per_byte as bpb

    columns = (TextColumn("scoring"), BarColumn(), TextColumn("{task.completed:,.0f} / {task.total:,.0f} tokens"))
    with Progress(*columns, TimeRemainingColumn(), console=progress_console, transient=True) as bar:
        task = bar.add_task("scoring", total=1)
        return bpb.score_documents(
            model,
            tokenizer,
            documents,
            context=context,
            stride=stride,
            batch_size=batch_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _quantize(
    model: Any,
    tokenizer: Any,
    recipe: str,
    trace: Path | None,
    documents: list[Any],
    context: int | None,
    batch_size: int | None,
) -> dict[str, Any]:
    """Replace the model's experts; what the JSON says about it."""
    from moesaic.view.quantize import parse, quantize_model

    weights = None
    if parse(recipe).mixed:
        weights = _counts_of_trace(trace) if trace is not None else _counts_on(model, tokenizer, documents, context, batch_size)
    made = quantize_model(model, recipe, weights)
    widths = [bits for layer in made.bits for bits in layer]
    return {
        "recipe": recipe,
        "importance": str(trace) if trace is not None else "this text" if weights is not None else None,
        "experts_by_bits": {str(bits): widths.count(bits) for bits in sorted(set(widths), reverse=True)},
        "expert_bytes": made.nbytes,
        "expert_bytes_before": made.stored_bytes,
        "linear": made.linears,
    }


def _counts_of_trace(path: Path) -> list[Any]:
    import torch

    from moesaic.trace import open_trace
    from moesaic.trace.statistics.counting import count

    trace = open_trace(path)
    counts_LE = torch.from_numpy(count(trace).counts_ULE.sum(0))
    return [counts_LE[layer, :experts] for layer, experts in enumerate(trace.experts_L)]


def _counts_on(model: Any, tokenizer: Any, documents: list[Any], context: int | None, batch_size: int | None) -> list[Any]:
    from moesaic.evaluation import bits_per_byte as bpb
    from moesaic.view.block import View
    from moesaic.view.quantize import chosen_counts

    counts, handles = chosen_counts(View(model))
    try:
        bpb.score_documents(model, tokenizer, documents, context=context, batch_size=batch_size)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def _streaming(result: dict[str, Any], lossy: Any) -> str:
    said = f"experts from disk, {result['policy']}: hit rate {result['hit_rate']:.1%}"
    if result["exact"]:
        return f"{said}; exact"
    return f"{said}; [yellow]not exact: {lossy}; {result['overlap']:.1%} of the routers' choices ran[/yellow]"


def _add_compressors(result: dict[str, Any], scores: dict[str, Any]) -> None:
    from moesaic.evaluation.compressors import compare

    for name, row in result["domains"].items():
        row.update({f"{key}_bits_per_byte": value for key, value in compare(scores[name].texts).items()})
    for key in ("xz", "zstd"):
        rows = [row for row in result["domains"].values() if row[f"{key}_bits_per_byte"] is not None]
        if rows:
            bits = sum(row[f"{key}_bits_per_byte"] * row["bytes"] for row in rows)
            result[f"{key}_bits_per_byte"] = bits / sum(row["bytes"] for row in rows)


def _table(result: dict[str, Any], compressors: bool) -> Table:
    table = Table(title=f"{result['model']}: bits per byte, context {result['context']}, {_weights(result)}")
    table.add_column("domain")
    names = ["bits/byte", "perplexity", "tokens", "bytes", *(["xz -9", "zstd -19"] if compressors else [])]
    for name in names:
        table.add_column(name, justify="right")

    def add(name: str, row: dict[str, Any], **style: Any) -> None:
        keys = ["bits_per_byte", "perplexity", "tokens", "bytes"]
        keys += ["xz_bits_per_byte", "zstd_bits_per_byte"] if compressors else []
        table.add_row(name, *(_cell(row.get(key)) for key in keys), **style)

    for name, row in result["domains"].items():
        add(name, row)
    table.add_section()
    add("all (total bits / total bytes)", result, style="bold")
    table.add_row("mean over domains", _cell(result["mean_bits_per_byte"]))
    return table


def _weights(result: dict[str, Any]) -> str:
    held = result.get("quantized")
    if held is None:
        return str(result["dtype"])
    share = held["expert_bytes"] / held["expert_bytes_before"]
    return f"{result['dtype']}, experts {held['recipe']} ({share:.0%} of their bytes)"


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


app = single(evaluate)
