"""`moesaic merge MODEL OUT --method m_smoe --keep 0.5 --data FILE`: several experts become one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moesaic.cli.common import Debug, Json, single
from moesaic.cli.options import Context, MaxBytes, Model, Threads, TrustRemoteCode, pairs
from moesaic.cli.surgical import CalibrationData, Domain, Options, Out, Plan, Resume, Sequential, Statistics, run_family


def merge(
    model: Model,
    out: Out = None,
    method: Annotated[str, typer.Option(help="A merger; `moesaic systems --family merge` lists them.")] = "m_smoe",
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
    """Average experts that are alike. The router keeps its rows, which then share experts (`--options router=map`), or
    becomes as small as the bank (`router=collapse`: stock, and approximate), or experts are written once per row (`repeat`).

    \b
    moesaic merge bundled OUT --method hc_smoe --keep 0.5 --data TEXT
    moesaic merge bundled OUT --keep 8 --options router=collapse --data TEXT
    """
    given: dict[str, Any] = pairs("--options", options)
    if keep is not None:
        given["keep"] = float(keep) if "." in keep else int(keep)
    run_family(
        "merge", model, out, method, given, plan=plan, resume=resume, json=json, threads=threads,
        trust_remote_code=trust_remote_code, data=data, statistics=statistics, domain=domain, max_bytes=max_bytes,
        context=context, sequential=sequential,
    )  # fmt: skip


app = single(merge)
