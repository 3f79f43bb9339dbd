"""`moesaic compress MODEL OUT --method low_rank --keep 0.5`: the same experts, each smaller."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moesaic.cli.common import Debug, Json, single
from moesaic.cli.options import Context, MaxBytes, Model, Threads, TrustRemoteCode, pairs
from moesaic.cli.surgical import CalibrationData, Domain, Options, Out, Plan, Resume, Sequential, Statistics, run_family
from moesaic.core.errors import BadInput


def compress(
    model: Model,
    out: Out = None,
    method: Annotated[str, typer.Option(help="A method; `moesaic systems --family compress` lists them.")] = "neurons",
    keep: Annotated[float | None, typer.Option(help="The share of the experts' bytes that stays, such as 0.5.")] = None,
    options: Options = "",
    data: CalibrationData = None,
    statistics: Statistics = None,
    domain: Domain = None,
    train_data: Annotated[
        str | None, typer.Option(help="mc_smoe: text to train on; rows go while the parts learn (instead of --data).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="With --train-data: optimiser steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="With --train-data: peak learning rate.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="With --train-data: the model to stay near; default: MODEL itself.")
    ] = None,
    max_bytes: MaxBytes = None,
    context: Context = None,
    sequential: Sequential = False,
    plan: Plan = False,
    resume: Resume = False,
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make every expert smaller. Fewer neurons (`neurons`) load in stock transformers; factors need `import moesaic`, or are
    multiplied out (`--options store=dense`: stock, and as large as before).

    \b
    moesaic compress bundled OUT --method neurons --keep 0.5 --data TEXT
    moesaic compress bundled OUT --method d2_moe --keep 0.5 --data TEXT
    moesaic compress MERGED OUT --method mc_smoe --keep 0.4 --train-data TEXT --steps 1000 --teacher MODEL
    """
    given: dict[str, Any] = pairs("--options", options)
    if keep is not None:
        given["keep"] = keep
    learning: dict[str, Any] = {}
    if train_data is not None:
        fields = {"steps": steps, "lr": lr}
        learning = {"texts": {"text": train_data}, "training": {k: v for k, v in fields.items() if v is not None}}
        learning["teacher"] = teacher
    elif steps is not None or lr is not None or teacher is not None:
        raise BadInput("--steps, --lr and --teacher are for training: name a text with --train-data")
    run_family(
        "compress", model, out, method, given, plan=plan, resume=resume, json=json, threads=threads,
        trust_remote_code=trust_remote_code, data=data, statistics=statistics, domain=domain, max_bytes=max_bytes,
        context=context, sequential=sequential, **learning,
    )  # fmt: skip


app = single(compress)
