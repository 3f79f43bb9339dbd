"""One step of the family `upcycle`: model folders in, a folder of another architecture out, written shard by shard, read back.

Memory: a few FFNs, whatever the models' size, where a method says tensor by tensor what the result is; methods that build a
live model say themselves what they hold.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from moesaic.core import registry
from moesaic.core.errors import BadInput
from moesaic.store import Reader
from moesaic.store.table import Table
from moesaic.surgery.card import write_notes
from moesaic.surgery.checkpoint import Checkpoint
from moesaic.surgery.conversion import Conversion, Told, ToMoE, meta
from moesaic.surgery.dense import Dense, check_alike
from moesaic.surgery.operate import Progress, Report
from moesaic.surgery.parts import Part, get
from moesaic.surgery.planning import Plan
from moesaic.surgery.shapes import facts_of
from moesaic.surgery.shards import MADE, Shards, check_out, copy_files
from moesaic.surgery.stock import NAMES, moe_layers
from moesaic.view import View
from moesaic.view.discover import find

FAMILY = "upcycle"


def build(name: str, options: dict[str, Any]) -> Conversion:
    """A method from its options. Raises BadInput or UnknownMethod for what it does not know."""
    entry = registry.get(FAMILY, name)
    unknown = sorted(set(options) - set(entry.parameters))
    if unknown:
        raise BadInput(f"{FAMILY} {name} has no option {unknown[0]!r}; it has {', '.join(entry.parameters) or 'none'}")
    try:
        method = entry.build(**options)
    except TypeError as error:
        raise BadInput(f"{FAMILY} {name}: {error}") from error
    assert isinstance(method, Conversion), f"{FAMILY} {name} is no Conversion"
    return method


def open_models(name: str, method: Conversion, paths: Sequence[str | Path], reader: Reader, **how: Any) -> list[Any]:
    """The models of a step. Raises BadInput for too few or many, or those that differ where they must not."""
    if not method.least <= len(paths) <= method.most:
        wanted = f"{method.least}" if method.least == method.most else f"{method.least} to {method.most}"
        raise BadInput(f"{FAMILY} {name} takes {wanted} model{'s' * (method.most > 1)}, given {len(paths)}")
    if method.takes == "moe":
        return [Checkpoint(path, reader, **how) for path in paths]
    models = [Dense(path, reader, **how) for path in paths]
    check_alike(models)
    return models


def plan_conversion(
    paths: Sequence[str | Path], name: str, options: dict[str, Any], domains: int | None = None, **how: Any
) -> Plan:
    """What a step will do. `domains`: of the text that there is, None where that is not known yet. Raises BadInput."""
    method = build(name, options)
    with Reader("keep") as reader:
        models = open_models(name, method, paths, reader, **how)
        return _plan(method, models, name, options, domains)


def plan_after(before: Plan, name: str, options: dict[str, Any], domains: int) -> Plan:
    """The same of what a plan before it leaves. Raises BadInput for methods that need dense models."""
    method = build(name, options)
    if method.takes != "moe":
        raise BadInput(f"{FAMILY} {name} takes dense models: make it the first step of the recipe")
    if not before.stock or before.model is None:
        raise BadInput(f"{before.method} leaves what {before.reason}; do this step before it")
    return _plan(method, [before], name, options, domains)


def _plan(method: Conversion, models: Sequence[Any], name: str, options: dict[str, Any], domains: int | None) -> Plan:
    outcome = method.plan(models)
    if domains is not None and domains < method.needs():
        raise BadInput(
            f"{FAMILY} {name} reads text of {method.needs()} domain{'s' * (method.needs() > 1)}, given {domains}: name text "
            "with --data (a file of {text, domain} lines, where it asks for several)"
        )
    before = sum(model.bytes_after if isinstance(model, Plan) else model.table.nbytes for model in models)
    made = None if outcome.config is None else meta(outcome.config)
    source = models[0].source if isinstance(models[0], Plan) else models[0].folder
    facts = [] if made is None or not any(True for _ in find(made)) else facts_of(View(made))
    return Plan(
        FAMILY, name, options, source, facts, [each.experts for each in facts], outcome.stock, outcome.reason, before,
        outcome.bytes_after, outcome.peak_bytes, {}, made,
    )  # fmt: skip


def convert(
    paths: Sequence[str | Path],
    out: str | Path,
    name: str,
    options: dict[str, Any] | None = None,
    *,
    told: Told | None = None,
    resume: bool = False,
    history: Sequence[dict[str, Any]] = (),
    progress: Progress = lambda what, done, total: None,
    **how: Any,
) -> Report:
    """Run one method on model folders and write the result to `out`.

    Args:
        told: text, and whatever else the method asks for.
        resume: go on with a step to the same `out` that was broken off.
        history: what was done to the first model before, for the result's `surgery.json`.

    Raises BadInput for what cannot apply, before anything is written; the inputs are never touched.
    """
    began, out, options, told = time.perf_counter(), Path(out), dict(options or {}), told or Told()
    told.resume = resume
    method = build(name, options)
    with ExitStack() as stack:
        reader = stack.enter_context(Reader("keep"))
        models = open_models(name, method, paths, reader, **how)
        plan = _plan(method, models, name, options, len(told.texts))
        for model in models:
            check_out(out, model.folder, plan.bytes_after)
        method.prepare(models, told)
        if isinstance(method, ToMoE):
            work = _Written(method, models, plan, told, progress)
            size = work.run(out, resume, list(history))
        else:
            size = method.write(models, out, told, _step(plan, models, told), list(history))
        read = reader.counters.bytes
    return Report(FAMILY, name, options, time.perf_counter() - began, plan.bytes_before, size, read, plan.stock, [])


def _step(plan: Plan, models: Sequence[Any], told: Told) -> dict[str, Any]:
    """What `surgery.json` says of the step, but for its size."""
    return {
        "family": FAMILY, "method": plan.method, "options": plan.options, "models": [model.folder.name for model in models],
        "bytes_before": plan.bytes_before, "stock": plan.stock,
        "calibration": {"text": sorted(told.texts)} if told.texts else None,
    }  # fmt: skip


class _Written:
    """A stock MoE of dense folders: the shard of all that is no expert, one per block, an index, and all of it read back."""

    def __init__(self, method: ToMoE, models: list[Dense], plan: Plan, told: Told, progress: Progress) -> None:
        self.method, self.models, self.plan, self.told, self.progress = method, models, plan, told, progress
        self.layers = moe_layers(method.config)
        self.reader = models[0].reader

    def run(self, out: Path, resume: bool, history: list[dict[str, Any]]) -> int:
        made_of = {
            "files": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for model in self.models for p in model.table.files],
            "step": [self.plan.method, self.plan.options],
            "text": _hashed(self.told),
        }  # fmt: skip
        shards = Shards(out, self.models[0].folder, made_of, len(self.layers) + 1, resume)
        if not shards.done(0):
            shards.copy(0, [(name, self.method.other(self.models, name)) for name in self._others()], self.reader)
        for number, layer in enumerate(self.layers, 1):
            if not shards.done(number):
                shards.copy(number, list(self.method.block(self.models, layer)), self.reader)
            self.progress("writing", number, len(self.layers))
        copy_files(self.models[0].folder, shards.partial, leave=(MADE, "surgery.json", "README.md", "config.json"))
        config = self.method.config
        config.architectures = [type(self.plan.model).__name__]
        config.dtype = self.models[0].ffn(0)["gate"].dtype
        config.save_pretrained(shards.partial)
        size = shards.index()
        self._read_back(shards.partial)
        step = {**_step(self.plan, self.models, self.told), "bytes_after": size, "blocks": self._blocks()}
        write_notes(shards.partial, self.models[0].folder.name, [*history, step])
        shards.finish()
        return size

    def _blocks(self) -> list[dict[str, Any]]:
        return [{"layer": layer, "experts_after": self.method.experts, **self.method.report(layer)} for layer in self.layers]

    def _others(self) -> list[str]:
        tied = self.method.config.tie_word_embeddings
        return [name for name in self.method.rest(self.models[0]) if not (tied and name == "lm_head.weight")]

    def _read_back(self, folder: Path) -> None:
        """Open the folder as transformers would and compare every tensor with what was to be written."""
        with Reader("drop") as reader:
            written = Checkpoint(folder, reader)
            for name in self._others():
                self._compare(folder, written.table, name, self.method.other(self.models, name), reader)
            for number, layer in enumerate(self.layers):
                if written.facts[number].layer != layer or written.facts[number].experts != self.method.experts:
                    raise BadInput(f"{folder}: read back, its blocks are others than were written; OUT was not made")
                for name, part in self.method.block(self.models, layer):
                    self._compare(folder, written.table, name, part, reader)
                for e in range(self.method.experts):
                    self._expert(folder, written, number, layer, e)
                self.progress("reading back", number + 1, len(self.layers))

    def _expert(self, folder: Path, written: Checkpoint, number: int, layer: int, e: int) -> None:
        """Expert e as transformers assembles it from the stored tensors."""
        names = NAMES[self.method.config.model_type].of_expert(layer, e)
        gate, up, down = (written.reader.read(written.table[names[part]]) for part in ("gate", "up", "down"))
        found = written.bank(number, [e])
        if not torch.equal(found[0][0], torch.cat([gate, up])) or not torch.equal(found[1][0], down):
            raise BadInput(f"{folder}: expert {e} of layer {layer} loads as another one than was written; OUT was not made")

    def _compare(self, folder: Path, table: Table, name: str, part: Part, reader: Reader) -> None:
        if not torch.equal(reader.read(table[name]), get(part, self.reader)):
            raise BadInput(f"{folder}: {name} read back from disk is not what was written; OUT was not made")


def _hashed(told: Told) -> str | None:
    """Of the text, so that a step that was broken off is not gone on with on another."""
    if not told.texts:
        return None
    held = {domain: [document.text for document in documents] for domain, documents in told.texts.items()}
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:16]
