"""`moesaic steer mogu`: the pair of LoRAs and the gates of MoGU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.common import Debug, Json, console, emit
from moesaic.cli.options import ChosenThreads, Dtype, Model, TrustRemoteCode, use_threads
from moesaic.cli.steer_rows import json_rows, texts_of
from moesaic.core.errors import BadInput

FORM = '{"prompt": text}, with "affirm" and "reject", its answers, or without'


def mogu(
    model: Model,
    harmless: Annotated[Path, typer.Option(help="Prompts to answer: a line each, or JSON lines {prompt, affirm, reject}.")],
    risky: Annotated[Path, typer.Option(help="Prompts to reject, alike.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The adapter to write.")] = Path("mogu.safetensors"),
    affirm: Annotated[str, typer.Option(help="The affirmative answer where a row has none.")] = "Sure, here it is:",
    reject: Annotated[str, typer.Option(help="The rejecting answer where a row has none.")] = "I cannot help with that.",
    rank: Annotated[int, typer.Option(help="Of the LoRAs; their alpha is twice that.")] = 8,
    epochs: Annotated[int, typer.Option(help="Of each LoRA.")] = 10,
    lr: Annotated[float, typer.Option(help="Of the LoRAs.")] = 5e-5,
    gate_epochs: Annotated[int, typer.Option(help="Of the gates.")] = 10,
    gate_lr: Annotated[float, typer.Option(help="Of the gates.")] = 5e-4,
    held_out: Annotated[float, typer.Option(help="Share of the rows that only measures.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of the order of rows, and of the adapter.")] = 0,
    max_prompts: Annotated[int, typer.Option(help="Read at most so many rows of each kind.")] = 1000,
    max_tokens: Annotated[int, typer.Option(help="Leave out rows that are longer.")] = 512,
    dtype: Dtype = "auto",
    threads: ChosenThreads = 1,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a safe and a usable variant of a model's attention, and the gates that mix them (MoGU); weights stay as they are.

    \b
    moesaic steer mogu bundled --harmless ask.txt --risky attack.txt -o mogu.safetensors
    moesaic run bundled "..." --steer mogu:adapter=mogu.safetensors
    """
    if min(rank, epochs, gate_epochs, max_prompts, max_tokens) < 1 or not 0 < held_out < 1:
        raise BadInput(
            "--rank, --epochs, --gate-epochs, --max-prompts, --max-tokens are at least 1; --held-out is above 0, below 1"
        )
    if not 0 < lr < float("inf") or not 0 < gate_lr < float("inf"):
        raise BadInput(f"--lr {lr}, --gate-lr {gate_lr}: above 0")
    import torch

    from moesaic.cli.loading import open_model
    from moesaic.core.files import check_writable
    from moesaic.steering.mogu_adapter import MoguAdapter, measure, train_gates, train_lora

    check_writable(out)
    texts = {name: _rows(path, f"--{name}", max_prompts, affirm, reject) for name, path in
             (("harmless", harmless), ("risky", risky))}  # fmt: skip
    use_threads(threads)
    live = open_model(model, dtype, dense_ok=True, trust_remote_code=trust_remote_code)
    learn, test = {}, {}
    random = torch.Generator().manual_seed(seed)
    for name, given in texts.items():
        rows = [row for row in (_ids(live.tokenizer, *row) for row in given) if _fits(row, max_tokens)]
        count = max(1, round(held_out * len(rows)))
        if len(rows) <= count:
            raise BadInput(f"--{name}: {len(rows)} rows within {max_tokens} tokens, {count} of them held out: give more")
        rows = [rows[i] for i in torch.randperm(len(rows), generator=random).tolist()]
        test[name], learn[name] = rows[:count], rows[count:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = MoguAdapter(live.model, rank=rank, alpha=2 * rank)
        losses = {
            "usable": train_lora(live.model, adapter, "usable", learn["risky"], epochs=epochs, lr=lr, seed=seed),
            "safe": train_lora(live.model, adapter, "safe", learn["harmless"], epochs=epochs, lr=lr, seed=seed),
            "gates": train_gates(
                live.model, adapter, learn["harmless"], learn["risky"], epochs=gate_epochs, lr=gate_lr, seed=seed
            ),
        }
    written = adapter.write(out)
    result: dict[str, Any] = {
        "adapter": str(written),
        "rows": {name: len(rows) for name, rows in learn.items()},
        "held_out": {name: len(rows) for name, rows in test.items()},
        "losses": {name: [found[0], found[-1]] for name, found in losses.items()},
        **measure(live.model, adapter, test["harmless"], test["risky"]),
    }
    if json:
        emit(result)
    else:
        _show(result)


def _rows(path: Path, option: str, most: int, affirm: str, reject: str) -> list[tuple[str, str, str]]:
    if path.name.endswith((".jsonl", ".json")):
        rows = json_rows(path, option, most, {FORM: lambda row: texts_of(row, ("prompt",), ("affirm", "reject"))})
        return [(row["prompt"], row.get("affirm", affirm), row.get("reject", reject)) for row in rows]
    from moesaic.cli.steer import prompts

    return [(text, affirm, reject) for text in prompts(path, most)]


Row = tuple[list[int], list[int], list[int]]


def _ids(tokenizer: Any, prompt: str, affirm: str, reject: str) -> Row:
    given, good, bad = (
        list(tokenizer(text, add_special_tokens=start)["input_ids"])
        for text, start in ((prompt, True), (affirm, False), (reject, False))
    )
    return given, good, bad


def _fits(row: Row, most: int) -> bool:
    return all(row) and len(row[0]) + max(len(row[1]), len(row[2])) <= most


def _show(result: dict[str, Any]) -> None:
    for name, (first, last) in result["losses"].items():
        console.print(f"{name}: loss {first:.4f} at first, {last:.4f} at last", highlight=False)
    console.print(
        f"held out {result['held_out']['harmless']} harmless, {result['held_out']['risky']} risky: gate a "
        f"{result['a_harmless']:.3f} and {result['a_risky']:.3f} (AUC {result['auc']:.3f}), b {result['b_harmless']:.3f} and "
        f"{result['b_risky']:.3f}; loss of harmless answers {result['loss_base']:.3f} -> {result['loss_mixed']:.3f}, "
        f"of rejections {result['reject_base']:.3f} -> {result['reject_mixed']:.3f}",
        highlight=False,
    )
    console.print(f"adapter: {result['adapter']}; use it: --steer mogu:adapter={result['adapter']}", highlight=False)
