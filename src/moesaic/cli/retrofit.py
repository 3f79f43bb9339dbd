"""`moesaic retrofit MODEL OUT --router NAME`: another router in a trained MoE, fine-tuned and scored before and after."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.common import Debug, Json, console, emit, facts_grid, progress_console, single
from moesaic.cli.loading import quiet_transformers
from moesaic.cli.options import ChosenThreads, Context, Dtype, MaxBytes, Model, TrustRemoteCode, pairs, use_threads
from moesaic.core.errors import BadInput
from moesaic.core.sizes import peak_bytes


def retrofit(
    model: Model,
    out: Annotated[Path | None, typer.Argument(help="The folder to write: not there yet, or empty.")] = None,
    router: Annotated[str, typer.Option(help="A registered router; `moesaic systems` lists them.")] = "topk",
    router_options: Annotated[str, typer.Option(help="Its options, such as k=3,nulls=8.")] = "",
    bank: Annotated[str | None, typer.Option(help="zero_computation: cheap experts behind the trained ones.")] = None,
    bank_options: Annotated[str, typer.Option(help="How many: constants=1,copies=1,zeros=1.")] = "",
    balance: Annotated[str, typer.Option(help="Balancing methods and coefficients, such as adamoe=0.01.")] = "",
    layers: Annotated[str | None, typer.Option(help="Layers to change, such as 0,1,2; default: all.")] = None,
    data: Annotated[str | None, typer.Option(help="Text to fine-tune on: a file or a folder.")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps of fine-tuning.")] = 0,
    train: Annotated[str, typer.Option(help="What learns: router, router+experts or all.")] = "router",
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-4,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 4,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the new weights and of the order of the data.")] = 0,
    eval_data: Annotated[str | None, typer.Option(help="Text to score before and after.")] = None,
    max_bytes: MaxBytes = None,
    context: Context = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done and written, and do nothing.")] = False,
    dtype: Dtype = "auto",
    threads: ChosenThreads = 1,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Put a router into a trained MoE, fine-tune it, and write a checkpoint: stock where the architecture can express it.

    \b
    moesaic retrofit bundled OUT --router adamoe --router-options k=3,nulls=8 --balance adamoe=0.01 --plan
    moesaic retrofit bundled OUT --router gw_moe --data TRAIN --steps 100 --train router+experts --eval-data VALID
    """
    if out is None and not plan:
        raise BadInput("OUT is missing: name the folder to write, or pass --plan")
    if steps < 0 or batch_size < 1 or seq_len < 2 or lr <= 0:
        raise BadInput(f"--steps {steps}, --batch-size {batch_size}, --seq-len {seq_len}, --lr {lr}: too small")
    if (steps > 0) != (data is not None):
        raise BadInput("--data and --steps go together: what to fine-tune on, and how long")
    how: dict[str, Any] = {
        "router_options": pairs("--router-options", router_options),
        "bank": bank,
        "bank_options": pairs("--bank-options", bank_options),
        "balance": pairs("--balance", balance),
        "layers": None if layers is None else numbers("--layers", layers),
    }
    quiet_transformers()
    import torch

    from moesaic.core.documents import data_files, read_documents, select
    from moesaic.surgery.card import read_history
    from moesaic.surgery.live import check_folder, write
    from moesaic.surgery.retrofit import check_trains, learns, plan_retrofit
    from moesaic.surgery.retrofit import retrofit as put_in
    from moesaic.training.finetune import finetune
    from moesaic.view import load, resolve_model

    check_trains("--train", train)
    if out is not None:
        check_folder(out)
    use_threads(threads)
    texts = [] if eval_data is None else select(read_documents(eval_data), max_bytes)
    if data is not None:
        data_files(data)
    began = time.perf_counter()
    source = resolve_model(model)
    live, tokenizer = load(source, dtype=dtype, trust_remote_code=trust_remote_code)
    facts = plan_retrofit(live, router, **how)[0].facts()
    bytes_before = _bytes(live)
    result: dict[str, Any] = {"out": None if out is None else str(out), "model": model, **facts, "bytes_before": bytes_before}
    if plan or out is None:
        result["bytes_after"] = bytes_before + facts["parameters_added"] * next(live.parameters()).element_size()
        _show(result, json)
        return
    say = progress_console.print
    if not json:
        _show(result, False)
    result["before"] = _scored(live, tokenizer, texts, context)
    torch.manual_seed(seed)
    done = put_in(live, router, **how)
    result["steps"] = [{"method": f"retrofit {router}", "seconds": time.perf_counter() - began}]
    result["untrained"] = _scored(live, tokenizer, texts, context)
    if data is not None:
        began_training = time.perf_counter()
        losses = finetune(
            live, tokenizer, data, learns(live, train), steps=steps, lr=lr, batch_size=batch_size, seq_len=seq_len, seed=seed,
            progress=lambda step, loss: say(f"step {step}  loss {loss:.3f}") if step % 10 == 0 else None,
        )  # fmt: skip
        result["steps"].append(
            {"method": f"fine-tune {train}, {steps} steps of {batch_size * seq_len} tokens",
             "seconds": time.perf_counter() - began_training, "first_loss": losses[0], "last_loss": losses[-1]}
        )  # fmt: skip
    settled = done.settle()
    recipe = {"family": "retrofit", "method": router, "source": model, "options": how, "training": {"steps": steps, "lr": lr}}
    result["after"] = _scored(settled, tokenizer, texts, context)
    write(settled, tokenizer, out, {"steps": [*read_history(Path(source)), recipe]})
    result["bytes_after"] = _bytes(settled)
    result["seconds"] = time.perf_counter() - began
    result["peak_bytes"] = peak_bytes()
    _show(result, json)


def numbers(option: str, text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise BadInput(f"{option} {text!r}: numbers separated by commas") from None


def _scored(model: Any, tokenizer: Any, texts: list[Any], context: int | None) -> dict[str, float] | None:
    """Bits per byte of the texts, and the experts that a token runs, mean over layers; None without texts."""
    if not texts:
        return None
    from moesaic.evaluation.bits_per_byte import report, score_documents
    from moesaic.view.block import View

    counted = [0, 0]

    def count(choice: Any, block: Any) -> None:
        runs_TK = (choice.ids >= 0) & (choice.ids < block.num_experts) & (choice.weights != 0)
        counted[0] += int(runs_TK.sum())
        counted[1] += len(runs_TK)

    handles = [block.on_choice(count) for block in View(model)]
    try:  # one piece at a time: padding would be counted
        scores = score_documents(model, tokenizer, texts, context=context, batch_size=1)
    finally:
        for handle in handles:
            handle.remove()
    total = report("", scores)
    return {
        "bits_per_byte": total["bits_per_byte"],
        "experts_per_token": counted[0] / max(1, counted[1]),
        "bytes": total["bytes"],
    }


def _bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _show(result: dict[str, Any], json: bool) -> None:
    if json:
        emit(result)
        return
    grid = facts_grid()
    options = ", ".join(f"{key}={value}" for key, value in result["router_options"].items())
    grid.add_row("router", f"{result['router']}({options})")
    grid.add_row("layers", ", ".join(map(str, result["layers"])))
    start = "the old router's rows" if result["starts_from_old_rows"] else "its own initial weights"
    grid.add_row("starts from", start)
    grid.add_row("adds", f"{result['parameters_added']:,} parameters")
    grid.add_row("checkpoint", f"loads with {result['loads_with']}: {result['reason']}")
    for name in ("before", "untrained", "after"):
        if result.get(name):
            scored = result[name]
            grid.add_row(
                name, f"{scored['bits_per_byte']:.4f} bits per byte, {scored['experts_per_token']:.2f} experts per token"
            )
    if "seconds" in result:
        grid.add_row("written", f"{result['out']} in {result['seconds']:,.1f} s")
    console.print(grid)


app = single(retrofit)
