"""`moesaic bench compression`: every registered way to make experts fewer or smaller, at equal shares of expert bytes.

Each method runs as `moesaic prune` and its like do, from a folder to a folder that is loaded again and scored on text that it
was not calibrated on: bits per byte of each domain, bytes, seconds of surgery, tokens per second of decoding. With `domain`
the same is done within one domain: calibrated on it, scored on it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from moesaic.bench import machine
from moesaic.core import registry
from moesaic.core.documents import Document, read_documents, select
from moesaic.core.errors import BadInput, MoesaicError
from moesaic.core.files import write_atomically
from moesaic.evaluation.bits_per_byte import report as scores_of
from moesaic.evaluation.bits_per_byte import score_documents
from moesaic.surgery.measure import measure
from moesaic.surgery.operate import operate
from moesaic.surgery.planning import LAYERWISE
from moesaic.trace.calibration import Calibration
from moesaic.view import load, resolve_model

ALL_TIERS = ("R0", "R1", "R2", "A1", "B")
OTHER_TIERS = ("R0", "C")
"""Kept row by row, and not by domain."""

VARIANTS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("merge", "*"): [{"router": "collapse"}, {}],
    ("prune", "reap"): [{}, {"scope": "global"}],
}
"""Options tried beside the defaults, where they decide what comes out."""


@dataclass
class Options:
    folder: Path | None = None
    model: str = "bundled"
    data: str = "../shared/data/corpus"
    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    methods: tuple[str, ...] = ()
    """ "prune reap" and so on; none: all."""
    domain: str | None = None
    calibrate_bytes: int = 20_000
    score_bytes: int = 1500
    context: int = 512
    speed_tokens: int = 24
    families: tuple[str, ...] = field(default=(*LAYERWISE,))


def run(options: Options, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Rows {family, method, options, share, bits_per_byte, domains, expert_bytes, bytes, stock, seconds, tokens_per_second}."""
    source = Path(str(resolve_model(options.model)))
    folder = Path(tempfile.mkdtemp(prefix="moesaic-compression-")) if options.folder is None else options.folder
    folder.mkdir(parents=True, exist_ok=True)
    learn, test = (
        _text(options, part, size) for part, size in (("train", options.calibrate_bytes), ("valid", options.score_bytes))
    )
    statistics = [_statistics(source, learn, folder, tiers, options, progress) for tiers in (ALL_TIERS, OTHER_TIERS)]
    whole = _measured(source, test, options)
    rows, notes = (
        [{"family": "", "method": "untouched", "options": {}, "share": 1.0, **whole, "seconds": 0.0, "stock": True}],
        [],
    )
    done = folder / f"rows-{options.domain or 'all'}.json"
    held = json.loads(done.read_text()) if done.is_file() else []
    rows += held
    for entry, chosen, share in _cells(options):
        name = f"{entry.family} {entry.name}"
        if any(_same(row, entry, chosen, share) for row in held):
            continue
        progress(f"{name} {chosen or ''} at {share:.0%}")
        out = folder / f"out-{options.domain or 'all'}"
        _clear(out)
        began = time.perf_counter()
        try:
            calibration = statistics["C" in entry.needs] if entry.needs else None
            made = operate(source, out, entry.family, entry.name, chosen, calibration=calibration)
            seconds = time.perf_counter() - began
            row = _measured(out, test, options)
        except MoesaicError as error:
            notes.append(f"{name} {json.dumps(chosen)} at {share:.0%}: {error}")
            continue
        row["expert_bytes"] = whole["expert_bytes"] - made.bytes_before + made.bytes_after
        packed = [sum(block["packed_bytes"]) for block in made.blocks if "packed_bytes" in block]
        if packed:  # rounded weights are as large as before; packed ones, which hold the same numbers, are not
            row["expert_bytes"] = sum(packed)
        rows.append(
            {"family": entry.family, "method": entry.name, "options": chosen, "share": share, **row, "seconds": seconds,
             "stock": made.stock}
        )  # fmt: skip
        write_atomically(done, json.dumps(rows[1:]))
    _clear(folder / f"out-{options.domain or 'all'}")
    if options.folder is None:
        shutil.rmtree(folder)
    facts = {"model": options.model, "domain": options.domain, "calibrated_bytes": sum(len(d.text.encode()) for d in learn),
             "scored_bytes": sum(len(d.text.encode()) for d in test), "context": options.context}  # fmt: skip
    return {"machine": machine.describe(), **facts, "rows": rows, "notes": notes}


def _cells(options: Options) -> Iterable[tuple[registry.Entry, dict[str, Any], float]]:
    known = {f"{entry.family} {entry.name}": entry for family in options.families for entry in registry.entries(family)}
    for name in options.methods:
        if name not in known:
            raise BadInput(f"--methods {name!r}: one of {', '.join(known)}")
    for name, entry in known.items():
        if options.methods and name not in options.methods:
            continue
        variants = VARIANTS.get((entry.family, entry.name)) or VARIANTS.get((entry.family, "*")) or [{}]
        for share in options.shares:
            for variant in variants:
                if not set(variant) <= set(entry.parameters):
                    continue
                yield entry, {**_size(entry, share), **variant, **_uniform(entry, variant)}, share


def _size(entry: registry.Entry, share: float) -> dict[str, Any]:
    """The option that says how much stays."""
    for name, value in (("keep", share), ("drop", 1 - share), ("bits", 16 * share)):
        if name in entry.parameters:
            return {name: value}
    return {}


def _uniform(entry: registry.Entry, variant: dict[str, Any]) -> dict[str, Any]:
    """A collapsed router is stock only where all layers keep as many."""
    return {"scope": "uniform"} if variant.get("router") == "collapse" and "scope" in entry.parameters else {}


def _same(row: dict[str, Any], entry: registry.Entry, chosen: dict[str, Any], share: float) -> bool:
    return (row["family"], row["method"], row["options"], row["share"]) == (entry.family, entry.name, chosen, share)


def _text(options: Options, part: str, size: int) -> list[Document]:
    found = [d for d in read_documents(Path(options.data) / part) if options.domain in (None, d.domain)]
    if not found:
        raise BadInput(f"{options.data}/{part} has no text of domain {options.domain!r}")
    return list(select(found, size * (4 if options.domain else 1)))


def _statistics(
    source: Path, learn: list[Document], folder: Path, tiers: tuple[str, ...], options: Options, progress: Callable[[str], None]
) -> Calibration:
    from moesaic.trace.calibration import open_calibration

    place = folder / f"statistics-{'-'.join(tiers)}-{options.domain or 'all'}"
    if place.is_dir() and open_calibration(place).header.progress["complete"]:
        return open_calibration(place)
    progress(f"calibrating {', '.join(tiers)}")
    some = learn if tiers != OTHER_TIERS else list(select(learn, options.calibrate_bytes // 4))
    return measure(source, some, place, tiers, context=options.context, every=4, source="train", resume=place.is_dir())


def _measured(folder: Path, test: list[Document], options: Options) -> dict[str, Any]:
    model, tokenizer = load(folder)
    found = scores_of("", score_documents(model, tokenizer, test, context=options.context))
    size = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    experts = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if ".experts." in name)
    return {
        "bits_per_byte": found["bits_per_byte"],
        "domains": {name: row["bits_per_byte"] for name, row in found["domains"].items()},
        "bytes": size, "expert_bytes": experts, "tokens_per_second": _speed(model, tokenizer, options.speed_tokens),
    }  # fmt: skip


def _speed(model: Any, tokenizer: Any, tokens: int) -> float:
    """Of greedy decoding, the median of three."""
    given = tokenizer("Once upon a time there was", return_tensors="pt")
    seconds = []
    with torch.inference_mode():
        for _ in range(3):
            began = time.perf_counter()
            model.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
            seconds.append(time.perf_counter() - began)
    return tokens / median(seconds)


def _clear(out: Path) -> None:
    for path in (out, out.with_name(out.name + ".partial")):
        shutil.rmtree(path, ignore_errors=True)
