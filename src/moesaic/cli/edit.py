"""`moesaic edit MODEL OUT --method NAME`: change what a trained MoE's experts or routers are, and train the change in."""

from __future__ import annotations

from typing import Annotated

import typer

from moesaic.cli.common import Debug, Json, single
from moesaic.cli.options import ChosenThreads, Context, Dtype, MaxBytes, Model, TrustRemoteCode, pairs, use_threads
from moesaic.cli.trained import Batch, Device, Lr, Out, Plan, Resume, Seed, SeqLen, Steps, check_out, of_domain, run, show
from moesaic.core.errors import BadInput


def edit(
    model: Model,
    out: Out = None,
    method: Annotated[str, typer.Option(help="compressed_experts, adamoe, moepp, gw_moe or evomoe.")] = "compressed_experts",
    options: Annotated[str, typer.Option(help="Its options, such as main=1,vectors=3.")] = "",
    data: Annotated[str | None, typer.Option(help="Text to train on: a file or a folder.")] = None,
    train_bytes: Annotated[int | None, typer.Option(help="Train on at most so many bytes of each domain.")] = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out text, scored before and after.")] = None,
    max_bytes: MaxBytes = None,
    context: Context = None,
    steps: Steps = 0,
    lr: Lr = 1e-4,
    batch_size: Batch = 4,
    seq_len: SeqLen = 256,
    seed: Seed = 0,
    plan: Plan = False,
    resume: Resume = False,
    dtype: Dtype = "auto",
    device: Device = None,
    threads: ChosenThreads = 1,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Edit a trained MoE and write a checkpoint: stock where the architecture can express it.

    \b
    moesaic edit bundled OUT --method compressed_experts --options main=1 --data TRAIN --steps 100 --eval-data VALID
    moesaic edit bundled OUT --method gw_moe --data TRAIN --steps 100 --plan
    """
    check_out(out, plan)
    if steps > 0 and data is None:
        raise BadInput("--data and --steps go together: what to train on, and how long")
    given = pairs("--options", options)
    texts = {} if data is None else {"text": of_domain("--data", data, None, keep=True, max_bytes=train_bytes)}
    held_out = {} if eval_data is None else {"text": of_domain("--eval-data", eval_data, None, keep=True, max_bytes=max_bytes)}
    use_threads(threads)
    report = run(
        model, out, family="edit", method=method, options=given, texts=texts, held_out=held_out, context=context, steps=steps,
        lr=lr, batch_size=batch_size, seq_len=seq_len, seed=seed, plan=plan, resume=resume, dtype=dtype, device=device,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    show(report, json)


app = single(edit)
