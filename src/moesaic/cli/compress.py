"""`moesaic compress MODEL OUT --method low_rank --keep 0.5`: the same experts, each smaller."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moesaic.cli.common import Debug, Json, single
from moesaic.cli.options import Context, MaxBytes, Model, Threads, TrustRemoteCode, pairs
from moesaic.cli.surgical import CalibrationData, Domain, Options, Out, Plan, Resume, Sequential, Statistics, run_family


def compress(
    model: Model,
    out: Out = None,
    method: Annotated[str, typer.Option(help="A method; `moesaic systems --family compress` lists them.")] = "neurons",
    keep: Annotated[float | None, typer.Option(help="The share of the experts' bytes that stays, such as 0.5.")] = None,
    options: Options = "",
    data: CalibrationData = None,
    statistics: Statistics = None,
    domain: Domain = None,
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
    """
    given: dict[str, Any] = pairs("--options", options)
    if keep is not None:
        given["keep"] = keep
    run_family(
        "compress", model, out, method, given, plan=plan, resume=resume, json=json, threads=threads,
        trust_remote_code=trust_remote_code, data=data, statistics=statistics, domain=domain, max_bytes=max_bytes,
        context=context, sequential=sequential,
    )  # fmt: skip


app = single(compress)
