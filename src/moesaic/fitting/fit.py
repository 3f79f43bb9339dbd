"""`fit`: measure the machine, look at a text, try the promising plans, and write the chosen one."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from moesaic.core.documents import Document, read_documents, select
from moesaic.core.errors import BadInput
from moesaic.core.files import write_atomically
from moesaic.core.sizes import show_bytes
from moesaic.fitting.plans import Candidate, Machine, Model, candidates, choose, pareto, promising
from moesaic.fitting.trial import Trials, tried
from moesaic.surgery.estimate import disk_rate
from moesaic.surgery.measure import measure
from moesaic.surgery.planning import Plan, open_plan
from moesaic.surgery.shards import check_out
from moesaic.trace.calibration import Calibration, open_calibration

NOTE = "fit.json"
CLAIM = "of.json"
"""In the folder where plans are built: which model and text they are of."""

TIERS = ("R0", "R1")
READ_RATE = 10e9
"""Bytes per second, where nobody measured them: only the order in which plans are tried hangs on it."""

PROMPT_CHARACTERS = 400


def fit(
    path: str | Path,
    memory: int,
    *,
    read_rate: float = READ_RATE,
    data: str | None = None,
    quality: float | None = None,
    out: Path | None = None,
    work: Path | None = None,
    most: int = 8,
    max_bytes: int | None = None,
    context: int | None = None,
    new_tokens: int = 48,
    threads: int | None = None,
    predict_only: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    **how: Any,
) -> dict[str, Any]:
    """Find the plan by which a model runs in `memory` bytes of weights.

    Args:
        read_rate: bytes per second that memory gives, as `moesaic bench machine` measures them.
        data: the user's text: half of each domain is calibrated on, the other half scored. Without one only exact plans are
            looked at.
        quality: the share of bits per byte that may be lost, such as 0.02; None: nothing, only exact plans are chosen.
        out: where the chosen checkpoint is written, with `fit.json`; None: nowhere.
        work: where plans are built, and stay; what is there already of the same model and text is used again. None: a
            temporary folder.
        most: plans that are measured.
        predict_only: do not build or run anything.

    Returns model, memory_bytes, machine (bytes per second), rows (plan, memory_bytes, tokens_per_second, bits_per_byte, exact,
    pareto, ...), chosen (a plan's name, or None), out, notes. Raises BadInput where nothing fits.
    """
    if quality is not None and (data is None or not quality >= 0):
        raise BadInput(f"quality {quality}: a share from 0 up, and a text to measure it on (--data)")
    opened = open_plan(path, **how)
    if out is not None:
        check_out(out, opened.source, opened.bytes_before)
    learn, test = halves(data, max_bytes) if data is not None else ([], [])
    with ExitStack() as stack:
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moesaic-fit-")))
        _claim(work, opened, [data, max_bytes, context])
        counts = list[Tensor]()

        def calibrate(folder: Path) -> Calibration:
            statistics = work / f"statistics-{'whole' if folder == opened.source else folder.name}"
            return _statistics(folder, learn, statistics, context, data or "", progress, how)

        if learn and not predict_only:
            calibration = calibrate(opened.source)
            counts = [calibration.layer(i)["selection_count"] for i in range(len(opened.facts))]
        experts = sum(f.experts * f.expert_bytes for f in opened.facts)
        model = Model(opened.facts, opened.bytes_before - experts, counts, 8 * opened.model.dtype.itemsize)
        machine = Machine(read_rate, disk_rate(opened.source))
        found = candidates(model, machine, memory, lossy=bool(data))
        if not found:
            raise BadInput(
                f"{show_bytes(memory)} of memory: what is no expert takes {show_bytes(model.other_bytes)} of this model, and "
                f"not even {'2-bit ' if data else ''}experts of {show_bytes(experts)} can be streamed through the rest"
            )
        report: dict[str, Any] = {
            "model": str(path), "memory_bytes": memory, "total_bytes": opened.bytes_before, "machine": machine._asdict(),
            "quality": quality, "candidates": [_planned(each) for each in found], "rows": [], "chosen": None, "notes": [],
            "out": None,
        }  # fmt: skip
        if predict_only:
            return report
        trials = Trials(opened.source, work, calibrate, work / "test.jsonl", _prompt(test), new_tokens, context, threads)
        _write_test(trials.test, test)
        rows, report["notes"] = tried(trials, promising(found, most), progress)
        for row, best in zip(rows, pareto(rows), strict=True):
            row["pareto"] = best
        index = choose(rows, quality)
        report["rows"] = rows
        if index is not None:
            report["chosen"] = rows[index]["plan"]
            if out is not None:
                report["out"] = str(_write(Path(rows[index]["folder"]), out, report, rows[index]))
        return report


def _claim(work: Path, opened: Plan, options: list[Any]) -> None:
    """Make `work`, or see that what lies in it was built of the same model and text. Raises BadInput."""
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(opened.source.glob("*.safetensors"))]
    own, note = json.dumps([str(opened.source.resolve()), files, options]), work / CLAIM
    if work.is_dir() and any(work.iterdir()) and not (note.is_file() and note.read_text() == own):
        raise BadInput(
            f"--work {work} holds something else than plans of this model and text: name another folder, or delete it"
        )
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(note, own)


def halves(data: str, max_bytes: int | None) -> tuple[list[Document], list[Document]]:
    """Text to calibrate on and text to score, of every domain; a domain of one document is cut in its middle.

    Raises BadInput for a text too short to cut.
    """
    by_domain: dict[str, list[Document]] = {}
    for document in read_documents(data):
        by_domain.setdefault(document.domain, []).append(document)
    learn, test = list[Document](), list[Document]()
    for domain, documents in by_domain.items():
        if len(documents) == 1:
            text = documents[0].text
            documents = [Document(text[: len(text) // 2], domain), Document(text[len(text) // 2 :], domain)]
        learn += documents[::2]
        test += documents[1::2]
    if not any(d.text.strip() for d in learn) or not any(d.text.strip() for d in test):
        raise BadInput(f"{data}: too little text to calibrate on one half and score the other")
    return list(select(learn, max_bytes, None)), list(select(test, max_bytes, None))


def _statistics(
    source: Path, learn: Sequence[Document], folder: Path, context: int | None, name: str, progress: Any, how: Any
) -> Any:
    if folder.is_dir() and open_calibration(folder).header.progress.get("complete"):
        return open_calibration(folder)
    return measure(
        source, learn, folder, TIERS, context=context, source=name, resume=folder.is_dir(),
        progress=lambda done, total: progress("looking at the text", done, total), **how,
    )  # fmt: skip


def _planned(plan: Candidate) -> dict[str, Any]:
    return {
        "plan": plan.name, "memory_bytes": plan.memory_bytes, "resident": plan.resident, "exact": plan.exact,
        "predicted_tokens_per_second": plan.predicted,
    }  # fmt: skip


def _prompt(test: Sequence[Document]) -> str:
    return next((d.text[:PROMPT_CHARACTERS] for d in test if d.text.strip()), "Once upon a time")


def _write_test(path: Path, test: Sequence[Document]) -> None:
    documents = test or [Document(f"{word}. " * 40, "text") for word in ("Once upon a time there was a machine",)]
    write_atomically(path, "".join(json.dumps({"text": d.text, "domain": d.domain}) + "\n" for d in documents))


def _write(folder: Path, out: Path, report: dict[str, Any], row: dict[str, Any]) -> Path:
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder, partial)
    row["command"] = row["command"].format(OUT=out)
    note = {key: report[key] for key in ("model", "memory_bytes", "quality", "rows", "chosen", "notes")}
    write_atomically(partial / NOTE, json.dumps(note, indent=1))
    if out.is_dir():
        out.rmdir()
    partial.rename(out)
    return out
