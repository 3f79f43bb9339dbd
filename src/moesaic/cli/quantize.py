"""`moesaic quantize MODEL OUT --method pmq --bits 4 --data FILE`: experts in few bits, by what a text showed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.common import Debug, Json, single
from moesaic.cli.options import Context, MaxBytes, Model, Threads, TrustRemoteCode, pairs
from moesaic.cli.surgical import CalibrationData, Domain, Options, Out, Plan, Resume, Statistics, execute, run_family, show
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
    calibration = {"data": data, "statistics": statistics, "domain": domain, "max_bytes": max_bytes, "context": context}
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
    from moesaic.kernels.low_bits import LEVELS
    from moesaic.serving.streamed.bits import WHOLE, Bits
    from moesaic.serving.streamed.packing import pack
    from moesaic.surgery.operate import build
    from moesaic.surgery.recipe import Step
    from moesaic.surgery.shards import check_out

    _, made = build("quantize", method, given)
    width = next((each for each in getattr(made, "widths", ()) if each not in (*LEVELS, WHOLE)), None)
    if width is not None:
        raise BadInput(f"{width} bits cannot be packed: records hold {', '.join(map(str, LEVELS))}; or take --format rounded")
    if not getattr(made, "on_grid", True):
        raise BadInput(f"{method} with these options rounds to other grids than records hold: take --format rounded")
    rounded = out.with_name(out.name + ".rounded")
    check_out(out, rounded)
    if not (resume and rounded.is_dir()):
        report = execute([Step("quantize", method, given, **calibration)], model, rounded, resume, threads, trust)
    else:
        report = _known(rounded, model)
    of_experts: dict[str, int] = {}
    for block in report["steps"][-1]["blocks"]:
        of_experts |= {f"{block['module']}.{e}": bits for e, bits in enumerate(block["bits"])}
    packed = pack(rounded, out, bits=Bits(of_experts), group_size=getattr(made, "group", 64), resume=resume)
    shutil.rmtree(rounded)
    report["steps"].append({"method": "pack", "bytes_after": packed.bytes_after, "seconds": 0.0, "stock": False})
    return {**report, "out": str(out), "bytes_after": packed.bytes_after, "stock": False}


def _known(rounded: Path, model: str) -> dict[str, Any]:
    """The report of a rounding whose packing was broken off."""
    from moesaic.surgery.card import read_history

    step = read_history(rounded)[-1]
    row = {"method": f"quantize {step['method']}", "bytes_after": step["bytes_after"], "seconds": 0.0, **step}
    return {"out": "", "model": model, "steps": [row], "bytes_before": step["bytes_before"], "peak_bytes": 0, "seconds": 0.0}


app = single(quantize)
