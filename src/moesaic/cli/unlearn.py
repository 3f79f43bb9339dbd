"""`moesaic unlearn MODEL OUT --method NAME`: make a model forget a text, keep another, and say what each became."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moesaic.cli.common import Debug, Json, single
from moesaic.cli.options import ChosenThreads, Context, Dtype, MaxBytes, Model, TrustRemoteCode, pairs, use_threads
from moesaic.cli.trained import Batch, Device, Lr, Out, Plan, Resume, Seed, SeqLen, Steps, check_out, of_domain, run, show
from moesaic.core.errors import BadInput


def unlearn(
    model: Model,
    out: Out = None,
    method: Annotated[str, typer.Option(help="seuf, ga, graddiff, npo or rmu.")] = "seuf",
    loss: Annotated[str | None, typer.Option(help="seuf: which loss its one expert learns: ga, graddiff, npo or rmu.")] = None,
    options: Annotated[str, typer.Option(help="Options of the method, such as experts=1,anchor=1.")] = "",
    loss_options: Annotated[str, typer.Option(help="seuf: options of its loss, such as beta=0.1.")] = "",
    forget: Annotated[str | None, typer.Option(help="Text to forget: a file or a folder.")] = None,
    retain: Annotated[str | None, typer.Option(help="Text to keep: a file or a folder.")] = None,
    domain: Annotated[str | None, typer.Option(help="Forget this domain of --forget; keep all others of --retain.")] = None,
    eval_forget: Annotated[str | None, typer.Option(help="Held-out text like --forget, scored before and after.")] = None,
    eval_retain: Annotated[str | None, typer.Option(help="Held-out text like --retain, scored before and after.")] = None,
    train_bytes: Annotated[int | None, typer.Option(help="Train on at most so many bytes of each domain.")] = None,
    max_bytes: MaxBytes = None,
    context: Context = None,
    steps: Steps = 100,
    until: Annotated[float | None, typer.Option(help="Stop at so many nats per token of the forget text.")] = None,
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
    """Forget a text by editing one expert (seuf) or the whole model, and write a stock checkpoint.

    \b
    moesaic unlearn bundled OUT --loss npo --forget FILE --retain FILE --steps 100 --plan
    moesaic unlearn bundled OUT --forget TRAIN --retain TRAIN --domain python --eval-forget VALID --eval-retain VALID
    """
    check_out(out, plan)
    given: dict[str, Any] = pairs("--options", options)
    if method == "seuf":
        given |= {} if loss is None else {"loss": loss}
        given |= {"loss_options": pairs("--loss-options", loss_options)} if loss_options else {}
    elif loss is not None or loss_options:
        raise BadInput(f"--loss and --loss-options are seuf's: {method} is a loss by itself; its options go into --options")
    if forget is None:
        raise BadInput("--forget is missing: name the text to forget")
    texts = {"forget": of_domain("--forget", forget, domain, keep=True, max_bytes=train_bytes)}
    if retain is not None:
        texts["retain"] = of_domain("--retain", retain, domain, keep=False, max_bytes=train_bytes)
    held_out = {}
    if eval_forget is not None:
        held_out["forget"] = of_domain("--eval-forget", eval_forget, domain, keep=True, max_bytes=max_bytes)
    if eval_retain is not None:
        held_out["retain"] = of_domain("--eval-retain", eval_retain, domain, keep=False, max_bytes=max_bytes)
    use_threads(threads)
    report = run(
        model, out, family="unlearn", method=method, options=given, texts=texts, held_out=held_out, context=context,
        steps=steps, until=until, lr=lr, batch_size=batch_size, seq_len=seq_len, seed=seed, plan=plan, resume=resume,
        dtype=dtype, device=device, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    show(report, json)


app = single(unlearn)
