"""`moesaic steer sdm`: the store by which SDM admits prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.common import Debug, Json, console, emit
from moesaic.cli.options import ChosenThreads, Dtype, Model, TrustRemoteCode, use_threads
from moesaic.cli.steer_rows import QUESTION, is_question, json_rows, question_ids, texts_of
from moesaic.core.errors import BadInput

LABELLED = '{"text": text, "label": text}'
FEWEST = 8
"""Rows of a class below which halves of them say nothing."""


def sdm(
    model: Model,
    data: Annotated[Path, typer.Option(help="JSON lines of {text, label}; or of {prompt, answer}: right and wrong answers.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The store to write.")] = Path("sdm.safetensors"),
    alpha: Annotated[float, typer.Option(help="Accuracy that each class of what is admitted should have.")] = 0.95,
    splits: Annotated[int, typer.Option(help="Random halves for training and calibration; the best is kept.")] = 10,
    held_out: Annotated[float, typer.Option(help="Share of the rows that only measures.")] = 0.25,
    width: Annotated[int, typer.Option(help="Of the adaptor.")] = 64,
    epochs: Annotated[int, typer.Option(help="Of the adaptor, on each split.")] = 20,
    lr: Annotated[float, typer.Option(help="Of the adaptor; the paper's 1e-5 is for far more rows.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of splits and training.")] = 0,
    max_prompts: Annotated[int, typer.Option(help="Read at most so many rows.")] = 5000,
    max_tokens: Annotated[int, typer.Option(help="Cut texts here; leave out prompts that are longer.")] = 512,
    dtype: Dtype = "auto",
    threads: ChosenThreads = 1,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Learn which prompts a model may answer (SDM), and measure it on rows held out.

    \b
    moesaic steer sdm bundled --data labelled.jsonl -o sdm.safetensors
    moesaic run bundled "..." --steer sdm:store=sdm.safetensors
    """
    if not 0.5 < alpha < 1 or not 0 < held_out < 1:
        raise BadInput(f"--alpha {alpha} is above 0.5 and below 1, --held-out {held_out} above 0 and below 1")
    if min(splits, width, epochs, max_prompts, max_tokens) < 1 or not 0 < lr < float("inf"):
        raise BadInput("--splits, --width, --epochs, --max-prompts and --max-tokens are at least 1, --lr above 0")
    import torch

    from moesaic.cli.loading import open_model
    from moesaic.core.files import check_writable
    from moesaic.steering.sdm import features, write_store
    from moesaic.steering.sdm_model import calibrate, measure

    check_writable(out)
    rows = json_rows(
        data, "--data", max_prompts, {LABELLED: lambda row: texts_of(row, ("text", "label")), QUESTION: is_question}
    )
    use_threads(threads)
    live = open_model(model, dtype, dense_ok=True, trust_remote_code=trust_remote_code)
    found = [pair for pair in (_labelled(live, row, max_tokens) for row in rows) if pair is not None]
    names = sorted({label for _, label in found})
    fewest = {name: sum(label == name for _, label in found) for name in names}
    if len(names) < 2:
        raise BadInput(f"--data {data}: every row is {names[0] if names else 'too long'!r}; give rows of two classes at least")
    for name, count in fewest.items():
        if count < FEWEST:
            raise BadInput(f"--data {data}: class {name!r} has {count} rows; give {FEWEST} at least, better hundreds")
    x_nD = torch.stack([features(live.model, ids) for ids, _ in found])
    label_n = torch.tensor([names.index(label) for _, label in found])
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    test, rest = order.split([round(held_out * len(found)), len(found) - round(held_out * len(found))])
    if not len(test):
        raise BadInput(f"--held-out {held_out} of {len(found)} rows leaves none to measure by")
    rule = calibrate(
        x_nD[rest], label_n[rest], len(names), alpha=alpha, splits=splits, seed=seed, width=width, epochs=epochs, lr=lr
    )
    written = write_store(out, rule, names)
    result: dict[str, Any] = {"store": str(written), "rows": len(found), "classes": fewest, "alpha": alpha}
    result |= {"held_out": len(test), **measure(rule, x_nD[test], label_n[test])}
    if json:
        emit(result)
        return
    show(result, f"sdm:store={result['store']}")


def _labelled(live: Any, row: dict[str, Any], most: int) -> tuple[list[int], str] | None:
    """Ids and class of a row; None of a prompt that is too long or empty."""
    if "label" in row:
        ids = list(live.tokenizer(row["text"])["input_ids"])[:most]
        return (ids, row["label"]) if ids else None
    from moesaic.steering.references import right

    ids, answer, choices = question_ids(live.tokenizer, row)
    if not 0 < len(ids) <= most or not answer or not all(choices):
        return None
    return ids, "right" if right(live.model, ids, answer, choices) else "wrong"


def show(result: dict[str, Any], spec: str) -> None:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    console.print(
        f"held out {result['held_out']:,} of {result['rows']:,} rows: accuracy {share(result['accuracy'])}; "
        f"admitted {share(result['coverage'])}, of these right {share(result['admitted_accuracy'])}; "
        f"softmax >= {result['alpha']:g}: {share(result['softmax_coverage'])}, right {share(result['softmax_accuracy'])}",
        highlight=False,
    )
    if not result["can_admit"]:
        console.print(f"[yellow]nothing reaches alpha {result['alpha']:g}: give more rows, or a lower --alpha[/yellow]")
    console.print(f"store: {result['store']}; use it: --steer {spec}", highlight=False)
