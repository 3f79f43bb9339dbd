"""`moesaic quantize MODEL OUT --method pmq --bits 4 --data FILE`: experts in few bits, by what a text showed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.common import Debug, Json, single
from moesaic.cli.options import Context, MaxBytes, Model, Threads, TrustRemoteCode, pairs
from moesaic.cli.surgical import (
    CalibrationData,
    Domain,
    Options,
    Out,
    Plan,
    Resume,
    Sequential,
    Statistics,
    execute,
    run_family,
    show,
)
from moesaic.core.errors import BadInput

FORMATS = ("rounded", "packed")


def quantize(
    model: Model,
    out: Out = None,
    method: Annotated[str, typer.Option(help="A method; `moesaic systems --family quantize` lists them.")] = "rtn",
    bits: Annotated[float | None, typer.Option(help="Mean bits per weight of an expert; 16 changes nothing.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="rounded: stock, as large as before. packed: smaller, needs moesaic.")
    ] = "rounded",
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
    """Round experts to few bits, each to its own; routers, shared experts and attention stay as they are.

    \b
    moesaic quantize bundled OUT --bits 4 --format packed
    moesaic quantize bundled OUT --method pmq --bits 3 --data TEXT
    moesaic run OUT "Once upon a time"
    """
    if form not in FORMATS:
        raise BadInput(f"--format {form}: one of {', '.join(FORMATS)}")
    given: dict[str, Any] = pairs("--options", options)
    if bits is not None:
        given["bits"] = bits
    calibration = {
        "data": data, "statistics": statistics, "domain": domain, "max_bytes": max_bytes, "context": context,
        "sequential": sequential,
    }  # fmt: skip
    if form == "rounded" or plan or out is None:
        run_family(
            "quantize", model, out, method, given, plan=plan, resume=resume, json=json, threads=threads,
            trust_remote_code=trust_remote_code, **calibration,
        )  # fmt: skip
        return
    report = _packed(model, out, method, given, calibration, resume, threads, trust_remote_code)
    show(report, json)


def _packed(
    model: str, out: Path, method: str, given: dict[str, Any], calibration: dict[str, Any], resume: bool, threads: int | None,
    trust: bool,
) -> dict[str, Any]:  # fmt: skip
    """Round beside OUT, then write codes and scales of what was rounded."""
    from moesaic.fitting.packed import check_packable, pack_rounded
    from moesaic.surgery.planning import build
    from moesaic.surgery.recipe import Step
    from moesaic.surgery.shards import check_out

    _, made = build("quantize", method, given)
    check_packable(method, made)
    rounded = out.with_name(out.name + ".rounded")
    check_out(out, rounded)
    if not (resume and rounded.is_dir()):
        report = execute([Step("quantize", method, given, **calibration)], model, rounded, resume, threads, trust)
    else:
        report = _known(rounded, model)
    packed = pack_rounded(rounded, out, report["steps"][-1]["blocks"], getattr(made, "group", 64), resume)
    report["steps"].append({"method": "pack", "bytes_after": packed.bytes_after, "seconds": 0.0, "stock": False})
    return {**report, "out": str(out), "bytes_after": packed.bytes_after, "stock": False}


def _known(rounded: Path, model: str) -> dict[str, Any]:
    """The report of a rounding whose packing was broken off."""
    from moesaic.surgery.card import read_history

    step = read_history(rounded)[-1]
    row = {"method": f"quantize {step['method']}", "bytes_after": step["bytes_after"], "seconds": 0.0, **step}
    return {"out": "", "model": model, "steps": [row], "bytes_before": step["bytes_before"], "peak_bytes": 0, "seconds": 0.0}


app = single(quantize)
