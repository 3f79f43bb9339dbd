"""What `unlearn`, `distill` and `edit` share on the command line: their options, how they run, what they print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.common import console, emit, facts_grid, progress_console
from moesaic.cli.loading import quiet_transformers
from moesaic.core.errors import BadInput
from moesaic.core.sizes import peak_bytes

Out = Annotated[Path | None, typer.Argument(help="The folder to write: not there yet, or empty.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps.")]
Lr = Annotated[float, typer.Option(help="Peak learning rate.")]
Batch = Annotated[int, typer.Option(help="Sequences per step, of each text.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per sequence.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn, and of the order of the data.")]
Plan = Annotated[bool, typer.Option("--plan", help="Say what would be done and written, and do nothing.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a training that was broken off.")]
Device = Annotated[str | None, typer.Option(help="Where to train, such as cuda; default: the CPU.")]


def check_out(out: Path | None, plan: bool) -> None:
    if out is None and not plan:
        raise BadInput("OUT is missing: name the folder to write, or pass --plan")


def of_domain(option: str, path: str, domain: str | None, *, keep: bool, max_bytes: int | None = None) -> list[Any]:
    """Documents of a path: all, or with a domain only its own (`keep`) or all others. Raises BadInput where none are left."""
    from moesaic.core.documents import read_documents, select

    found = list(read_documents(path))
    if domain is not None:
        known = sorted({document.domain for document in found})
        if keep and domain not in known:
            raise BadInput(f"{option} {path} has no domain {domain!r}: it has {', '.join(known) or 'none'}")
        found = [document for document in found if (document.domain == domain) == keep]
    found = select(found, max_bytes)
    if not any(document.text.strip() for document in found):
        raise BadInput(f"{option} {path} holds no text" + (f" outside domain {domain!r}" if domain and not keep else ""))
    return found


def run(
    model: str, out: Path | None, *, context: int | None, steps: int, lr: float, batch_size: int, seq_len: int, seed: int,
    until: float | None = None, **how: Any,
) -> dict[str, Any]:  # fmt: skip
    """`run_step` with the project's loop and scorer."""
    quiet_transformers()
    from moesaic.evaluation.bits_per_byte import report as reported
    from moesaic.evaluation.bits_per_byte import score_documents
    from moesaic.surgery.trained import Training, run_step
    from moesaic.training.finetune import finetune
    from moesaic.view import resolve_model

    def score(live: Any, tokenizer: Any, documents: list[Any]) -> dict[str, Any]:
        total = reported("", score_documents(live, tokenizer, documents, context=context))
        domains = {name: row["bits_per_byte"] for name, row in total["domains"].items()}
        return {"bits_per_byte": total["bits_per_byte"], "bytes": total["bytes"], "domains": domains}

    teacher = how.pop("teacher", None)
    source = model if teacher is not None and model.endswith(".json") else resolve_model(model)
    training = Training(steps=steps, lr=lr, batch_size=batch_size, seq_len=seq_len, seed=seed, until=until)
    learn_from = None if teacher is None else resolve_model(teacher)
    report = run_step(
        source, out, teacher=learn_from, train=finetune, score=score, say=progress_console.print, training=training, **how
    )
    report["model"] = model
    report["peak_bytes"] = peak_bytes()
    return report


def show(report: dict[str, Any], json: bool) -> None:
    if json:
        emit(report)
        return
    grid = facts_grid()
    options = ", ".join(f"{key}={value}" for key, value in report["options"].items())
    grid.add_row(report["family"], f"{report['method']}({options})")
    grid.add_row("trains", report["trains"])
    grid.add_row("checkpoint", f"loads with {report['loads_with']}: {report['reason']}")
    for step in report.get("steps", []):
        for edited in step.get("edited", []):
            grid.add_row("edited", f"expert {edited['expert']} of layer {edited['layer']}")
        for name, after in step.get("after", {}).items():
            grid.add_row(name, f"{after['bits_per_byte']:.4f} bits per byte after {step['method']}")
    for name, after in report.get("after", {}).items():
        before = report["before"][name]["bits_per_byte"]
        grid.add_row(name, f"{before:.4f} -> {after['bits_per_byte']:.4f} bits per byte")
    for name, share in report.get("router_overlap", {}).items():
        grid.add_row(f"same experts, {name}", f"{share:.1%} of choices")
    if "seconds" in report:
        grid.add_row("written", f"{report['out']} in {report['seconds']:,.1f} s")
    console.print(grid)
