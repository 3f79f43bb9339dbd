"""`moesaic distill TEACHER OUT --student MODEL --method NAME`: a student learns from a teacher's distributions."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moesaic.cli.common import Debug, Json, single
from moesaic.cli.options import ChosenThreads, Context, Dtype, MaxBytes, TrustRemoteCode, pairs, use_threads
from moesaic.cli.trained import Batch, Device, Lr, Out, Plan, Resume, Seed, SeqLen, Steps, check_out, of_domain, run, show
from moesaic.core.errors import BadInput


def distill(
    teacher: Annotated[str, typer.Argument(help="A local folder, a hub id, or `bundled`.")],
    out: Out = None,
    student: Annotated[str | None, typer.Option(help="A model, or a .json file of config fields for a fresh one.")] = None,
    method: Annotated[str, typer.Option(help="llava_mod, tgeo_kd, recover or dense2moe.")] = "llava_mod",
    options: Annotated[str, typer.Option(help="Its options, such as experts=4,k=2.")] = "",
    data: Annotated[str | None, typer.Option(help="Text to learn from: a file or a folder.")] = None,
    valid: Annotated[str | None, typer.Option(help="tgeo_kd: other text, on which its controller learns.")] = None,
    preferences: Annotated[
        str | None, typer.Option(help="llava_mod: {prompt, chosen, rejected} JSON lines, with --options preference=kto_pair.")
    ] = None,
    answers: Annotated[
        str | None, typer.Option(help="llava_mod: {prompt, response} JSON lines in the place of --data; responses alone count.")
    ] = None,
    train_bytes: Annotated[int | None, typer.Option(help="Learn from at most so many bytes of each domain.")] = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out text, scored before and after.")] = None,
    max_bytes: MaxBytes = None,
    context: Context = None,
    steps: Steps = 100,
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
    """Distil a teacher into a student, which llava_mod turns into a MoE on the way, and write a stock checkpoint.

    \b
    moesaic distill bundled OUT --student dense.json --data TRAIN --steps 400 --lr 1e-3 --eval-data VALID
    moesaic distill TEACHER OUT --student MODEL --method tgeo_kd --data TRAIN --valid OTHER --steps 100
    """
    check_out(out, plan)
    if student is None:
        raise BadInput("--student is missing: a model, or a .json file of config fields such as model_type and hidden_size")
    given, texts = pairs("--options", options), {}
    for option, name, path in (("--data", "text", data), ("--valid", "valid", valid)):
        if path is not None:
            texts[name] = of_domain(option, path, None, keep=True, max_bytes=train_bytes)
    found: dict[str, Any] = dict(texts) | ({} if preferences is None else {"preferences": preferences})
    if answers is not None:
        found["answers"], given["answers"] = answers, True
    held_out = {} if eval_data is None else {"text": of_domain("--eval-data", eval_data, None, keep=True, max_bytes=max_bytes)}
    use_threads(threads)
    report = run(
        student, out, family="distill", method=method, options=given, texts=found, held_out=held_out, context=context,
        steps=steps, lr=lr, batch_size=batch_size, seq_len=seq_len, seed=seed, plan=plan, resume=resume, dtype=dtype,
        device=device, teacher=teacher, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    show(report, json)


app = single(distill)
