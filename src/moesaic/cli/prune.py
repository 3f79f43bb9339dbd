"""`moesaic prune MODEL OUT --method reap --keep 0.5 --data FILE`: fewer experts, chosen by what a text showed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moesaic.cli.common import Debug, Json, single
from moesaic.cli.options import Context, MaxBytes, Model, Threads, TrustRemoteCode, pairs
from moesaic.cli.surgical import CalibrationData, Domain, Options, Out, Plan, Resume, Sequential, Statistics, run_family


def prune(
    model: Model,
    out: Out = None,
    method: Annotated[str, typer.Option(help="A pruner; `moesaic systems --family prune` lists them.")] = "reap",
    keep: Annotated[str | None, typer.Option(help="Experts that stay: a share such as 0.5, or a number per layer.")] = None,
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
    """Drop experts of every layer; the result loads in stock transformers at its new size.

    \b
    moesaic prune bundled OUT --keep 0.5 --data TEXT --plan
    moesaic prune bundled OUT --method frequency --keep 12 --data TEXT --domain python
    """
    given: dict[str, Any] = pairs("--options", options)
    if keep is not None:
        given["keep"] = float(keep) if "." in keep else int(keep)
    run_family(
        "prune", model, out, method, given, plan=plan, resume=resume, json=json, threads=threads,
        trust_remote_code=trust_remote_code, data=data, statistics=statistics, domain=domain, max_bytes=max_bytes,
        context=context, sequential=sequential,
    )  # fmt: skip


app = single(prune)
