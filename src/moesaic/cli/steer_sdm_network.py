"""`moesaic steer sdm-network`: the second head by which SDM verifies an answer unit by unit, and its store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.common import Debug, Json, console, emit
from moesaic.cli.options import ChosenThreads, Dtype, Model, TrustRemoteCode, use_threads
from moesaic.cli.steer_rows import json_rows, texts_of
from moesaic.cli.steer_sdm import show
from moesaic.core.errors import BadInput

FORM = '{"prompt": text, "text": text, "label": "right" or "wrong"}'


def sdm_network(
    model: Model,
    data: Annotated[
        Path, typer.Option(help="JSON lines of {prompt, text, label}: what stands before a unit, the unit, right or wrong.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The store to write.")] = Path("units.safetensors"),
    head: Annotated[Path, typer.Option(help="The head to write.")] = Path("head.safetensors"),
    unit: Annotated[int, typer.Option(help="Cut units to so many tokens.")] = 16,
    alpha: Annotated[float, typer.Option(help="Accuracy that each class of what is admitted should have.")] = 0.95,
    splits: Annotated[int, typer.Option(help="Random halves of the verification layer's rows; the best is kept.")] = 10,
    held_out: Annotated[
        float, typer.Option(help="Share of the rows that only measures; half of the others train the head.")
    ] = 0.25,
    width: Annotated[int, typer.Option(help="Of the verification layer.")] = 64,
    epochs: Annotated[int, typer.Option(help="Of the verification layer, on each split.")] = 20,
    lr: Annotated[float, typer.Option(help="Of the verification layer.")] = 1e-3,
    head_epochs: Annotated[int, typer.Option(help="Of the head.")] = 4,
    head_lr: Annotated[float, typer.Option(help="Of the head.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of splits and training.")] = 0,
    max_prompts: Annotated[int, typer.Option(help="Read at most so many rows.")] = 5000,
    max_tokens: Annotated[int, typer.Option(help="Leave out rows that are longer.")] = 512,
    dtype: Dtype = "auto",
    threads: ChosenThreads = 1,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a second head beside a frozen model (SDM network) and the layer that verifies each unit of an answer.

    \b
    moesaic steer sdm-network bundled --data units.jsonl -o units.safetensors --head head.safetensors
    moesaic run bundled "..." --steer sdm_network:store=units.safetensors,head=head.safetensors,redraws=4 --temperature 1
    """
    if not 0.5 < alpha < 1 or not 0 < held_out < 1:
        raise BadInput(f"--alpha {alpha} is above 0.5 and below 1, --held-out {held_out} above 0 and below 1")
    if min(unit, splits, width, epochs, head_epochs, max_prompts, max_tokens) < 1:
        raise BadInput("--unit, --splits, --width, --epochs, --head-epochs, --max-prompts and --max-tokens are at least 1")
    if not 0 < lr < float("inf") or not 0 < head_lr < float("inf"):
        raise BadInput(f"--lr {lr}, --head-lr {head_lr}: above 0")
    if out.resolve() == head.resolve():
        raise BadInput(f"--out and --head are both {out}: they are two files")
    import torch

    from moesaic.cli.loading import open_model
    from moesaic.core.files import check_writable
    from moesaic.steering.sdm import write_store
    from moesaic.steering.sdm_head import NAMES, train_head, unit_features
    from moesaic.steering.sdm_model import calibrate, measure

    check_writable(out)
    check_writable(head)
    rows = json_rows(
        data, "--data", max_prompts,
        {FORM: lambda row: texts_of(row, ("prompt", "text", "label")) and row["label"] in NAMES},
    )  # fmt: skip
    use_threads(threads)
    live = open_model(model, dtype, dense_ok=True, trust_remote_code=trust_remote_code)
    units = []
    for row in rows:
        before = list(live.tokenizer(row["prompt"])["input_ids"])
        own = list(live.tokenizer(row["text"], add_special_tokens=False)["input_ids"])[:unit]
        if before and own and len(before) + len(own) <= max_tokens:
            units.append((before, own, NAMES.index(row["label"])))
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed)).tolist()
    count = round(held_out * len(units))
    test, first, second = order[:count], order[count::2], order[count + 1 :: 2]
    if not test:
        raise BadInput(f"--held-out {held_out} of {len(units)} rows within {max_tokens} tokens leaves none to measure by")
    trained, losses = train_head(
        live.model, [units[i] for i in first], epochs=head_epochs, lr=head_lr, width=width, verify_epochs=epochs,
        verify_lr=lr, seed=seed,
    )  # fmt: skip
    x_nF = torch.stack([unit_features(live.model, trained, *units[i][:2]) for i in second + test])
    trained.standardise(x_nF[: len(second)])
    x_nF = (x_nF - trained.shift_F) * trained.scale_F
    label_n = torch.tensor([units[i][2] for i in second + test])
    rule = calibrate(
        x_nF[: len(second)], label_n[: len(second)], 2, alpha=alpha, splits=splits, seed=seed, width=width, epochs=epochs, lr=lr
    )
    result: dict[str, Any] = {
        "store": str(write_store(out, rule, NAMES)),
        "head": str(trained.write(head)),
        "rows": len(units),
        "unit": unit,
        "alpha": alpha,
        "losses": losses,
        "held_out": len(test),
        **measure(rule, x_nF[len(second) :], label_n[len(second) :]),
    }
    if json:
        emit(result)
        return
    console.print(f"head: loss {losses[0]:.3f} in the first epoch, {losses[-1]:.3f} in the last", highlight=False)
    show(result, f"sdm_network:store={result['store']},head={result['head']},unit={unit}")
