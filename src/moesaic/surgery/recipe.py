"""A recipe: steps of surgery one after another, each from a checkpoint to a checkpoint, planned whole before the first begins.

    data: corpus/train              # calibration text of all steps that need one
    max_bytes: 20000                # of each domain
    steps:
      - prune: reap
        keep: 0.75                  # options of the method, by their names
      - merge: hc_smoe
        keep: 0.5
        router: collapse
        domain: python              # its statistics from one domain only
      - unlearn: seuf
        loss: npo
        texts: {forget: secrets.txt, retain: corpus/train}
        training: {steps: 100, lr: 1e-4}

A recipe may begin with dense models (`upcycle: btx`, `models: [law, code]` beside the one it is called with), and may end with
one (`upcycle: dense`); a `distill` step names its `teacher`.

What a step leaves lies in OUT.steps until the next one has read it; a run that was broken off goes on behind the last whole
step, and within a step behind the last whole block.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

from moesaic.core import registry
from moesaic.core.documents import data_files, read_documents, select
from moesaic.core.errors import BadInput, NotMoE
from moesaic.core.files import write_atomically
from moesaic.core.primitives import keep_few
from moesaic.core.sizes import peak_bytes
from moesaic.store import Reader
from moesaic.surgery.card import read_history, write_notes
from moesaic.surgery.conversion import Told
from moesaic.surgery.convert import FAMILY, convert, plan_after, plan_conversion
from moesaic.surgery.convert import build as build_conversion
from moesaic.surgery.dense import Dense
from moesaic.surgery.measure import measure
from moesaic.surgery.objective import Train
from moesaic.surgery.operate import Progress, operate
from moesaic.surgery.planning import LAYERWISE, Plan, build, check_needs, open_plan, plan_alone, plan_step
from moesaic.surgery.sequential import Text
from moesaic.surgery.shards import check_out
from moesaic.surgery.trained import build as build_objective
from moesaic.trace.calibration import open_calibration

TRAINED = ("unlearn", "distill", "edit")
FOLDERS = (FAMILY,)
"""Families of which a step takes one model folder or several, and makes another architecture."""

TRAINING_BYTES = 3
"""What a trained step holds, in checkpoints of bfloat16, about: weights, their float32, gradients."""

CALIBRATION = ("data", "max_bytes", "context", "statistics", "domain", "by_domain", "every")


@dataclass(frozen=True)
class Step:
    """One step; what it does not say of its calibration text, the recipe says."""

    family: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    statistics: str | None = None
    """A folder of `moesaic calibrate`, of the model that this step gets."""
    domain: str | None = None
    by_domain: bool = False
    max_bytes: int | None = None
    context: int | None = None
    every: int = 1
    sequential: bool = False
    """Calibrate each layer with those before it already changed (surgery/sequential.py)."""
    models: tuple[str, ...] = ()
    """Of upcycle: further models beside the one that the step gets."""
    teacher: str | None = None
    """Of distill and of a compress that trains: the model to learn from. By default that of the recipe, where distill is not
    its first step."""
    texts: dict[str, str] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.family} {self.method}"

    @property
    def trains(self) -> bool:
        """Of one family that is layer-wise otherwise, too, where there is a text to train on."""
        return self.family in TRAINED or (self.family in LAYERWISE and bool(self.texts or self.training))


class Trainer(Protocol):
    """Runs a trained step; with `out` None it plans it. Returns the report of surgery/trained.py."""

    def __call__(self, step: Step, source: Path, out: Path | None, resume: bool = False) -> dict[str, Any]: ...


def parse(recipe: Mapping[str, Any], where: str = "recipe", root: Path | None = None) -> list[Step]:
    """The steps of a recipe. Paths in it are relative to `root`. Raises BadInput naming step and field."""
    if not isinstance(recipe, Mapping) or not isinstance(recipe.get("steps"), list) or not recipe["steps"]:
        raise BadInput(f"{where}: a recipe holds a list `steps`, such as [{{prune: reap, keep: 0.5}}]")
    shared = {key: value for key, value in recipe.items() if key != "steps"}
    known = [each.name for each in fields(Step) if each.name in CALIBRATION]
    for key in shared:
        if key not in known:
            raise BadInput(f"{where}: unknown field {key!r}; beside `steps` it may hold {', '.join(known)}")
    return [_step(number, given, shared, where, root or Path()) for number, given in enumerate(recipe["steps"], 1)]


def _step(number: int, given: Any, shared: dict[str, Any], where: str, root: Path) -> Step:
    here = f"{where}, step {number}"
    families = [*LAYERWISE, *TRAINED, *FOLDERS]
    if not isinstance(given, Mapping):
        raise BadInput(f"{here}: a step is a mapping such as {{prune: reap, keep: 0.5}}")
    named = [key for key in given if key in families]
    if len(named) != 1:
        raise BadInput(f"{here}: names {' and '.join(named) or 'no method'}; a step names one of {', '.join(families)}")
    family, method = named[0], str(given[named[0]])
    own = {each.name for each in fields(Step)} - {"family", "method", "options"}
    values = {**shared, **{key: value for key, value in given.items() if key in own}}
    options = {key: value for key, value in given.items() if key not in own and key != family}
    for key in ("data", "statistics"):
        if values.get(key) is not None:
            values[key] = str(root / values[key])
    if values.get("teacher") is not None:
        values["teacher"] = _model_path(values["teacher"], root)
    if "models" in values:
        if not isinstance(values["models"], list):
            raise BadInput(f"{here}: models is a list of model folders")
        values["models"] = tuple(_model_path(path, root) for path in values["models"])
    for key, owners in (("models", (FAMILY,)), ("teacher", ("distill", "compress"))):
        if values.get(key) and family not in owners:
            raise BadInput(f"{here}: {key} is for a step of {' or '.join(owners)}")
    if "texts" in values:
        values["texts"] = {name: str(root / path) for name, path in values["texts"].items()}
    known = registry.get(family, method).parameters
    for key in options:
        if key not in known:
            raise BadInput(f"{here}: {family} {method} has no option {key!r}; it has {', '.join(known) or 'none'}")
    step = Step(family, method, options, **values)
    if step.trains and family in LAYERWISE and build(family, method, dict(options))[1].objective() is None:
        raise BadInput(f"{here}: {family} {method} does not train; `distill: recover` behind it trains what it leaves")
    if not isinstance(step.sequential, bool) or (step.sequential and (step.trains or family not in LAYERWISE)):
        raise BadInput(f"{here}: sequential is true or false, and for a step of {', '.join(LAYERWISE)} that does not train")
    return step


def _model_path(path: Any, root: Path) -> str:
    """A folder beside the recipe; a hub id or `bundled` as it is."""
    return str(root / str(path)) if (root / str(path)).is_dir() else str(path)


def plan_recipe(model: str | Path, steps: list[Step], trainer: Trainer | None = None, **how: Any) -> list[Plan]:
    """Every step's plan, each on what the one before leaves. Raises BadInput naming the step that cannot apply."""
    plans: list[Plan] = []
    steps = _taught(model, steps)
    before = _opened(model, steps[0], **how)
    for number, step in enumerate(steps, 1):
        try:
            if step.trains:
                before = _plan_trained(before, step, trainer, Path(before.source) if number == 1 else None)
            elif step.family in LAYERWISE:
                before = plan_step(before, step.family, step.method, dict(step.options), step.sequential)
                _check_text(step)
            else:
                before = _plan_conversion(model, before, step, first=number == 1, how=how)
        except BadInput as error:
            raise BadInput(f"step {number} ({step.name}): {error}") from error
        plans.append(before)
    return plans


def _taught(model: str | Path, steps: list[Step]) -> list[Step]:
    """Steps of distill behind the first learn from the recipe's own model, unless they name another."""
    return [
        replace(step, teacher=str(model)) if number and step.family == "distill" and step.teacher is None else step
        for number, step in enumerate(steps)
    ]


def _opened(model: str | Path, first: Step, **how: Any) -> Plan:
    """What the first step meets: a MoE, or, where it is one that takes them, a dense model."""
    if first.family not in FOLDERS and first.family != "distill":
        return open_plan(model, **how)
    try:
        return open_plan(model, **how)
    except NotMoE:
        with Reader("keep") as reader:
            dense = Dense(model, reader, **how)
        size = dense.table.nbytes
        return Plan("", "", {}, dense.folder, [], [], True, "a dense model", size, size, 0)


def _plan_conversion(model: str | Path, before: Plan, step: Step, first: bool, how: dict[str, Any]) -> Plan:
    domains = None if step.data is None else len({document.domain for document in _documents(step)})
    if first:
        return plan_conversion([model, *step.models], step.method, dict(step.options), domains or 0, **how)
    return plan_after(before, step.method, dict(step.options), domains or 0)


def _documents(step: Step) -> list[Any]:
    if step.data is None:
        return []
    found = [each for each in read_documents(step.data) if step.domain in (None, each.domain)]
    return list(select(found, step.max_bytes, None))


def _plan_trained(before: Plan, step: Step, trainer: Trainer | None, source: Path | None) -> Plan:
    if trainer is None:
        raise BadInput("no training loop was given")
    objective = build_objective(step.family, step.method, step.options)
    if not before.stock and step.family != "edit" and not objective.takes_reshaped:
        raise BadInput(f"{before.method} leaves what {before.reason}; train before it")
    for name, path in step.texts.items():
        try:
            data_files(path)
        except BadInput as error:
            raise BadInput(f"texts, {name}: {error}") from error
    facts: dict[str, Any] = {"stock": before.stock, "reason": before.reason}
    if source is not None:
        facts = trainer(step, source, None)
    after, left = before.bytes_after, before
    if step.family in LAYERWISE:
        entry, method = build(step.family, step.method, dict(step.options))
        method.remark = "its parts learn on the text"
        made = plan_alone(before, entry, method, step.options)
        after, left, facts = made.bytes_after, made, {"stock": made.stock, "reason": made.reason}
    return Plan(
        step.family, step.method, step.options, before.source, before.facts, before.experts, bool(facts["stock"]),
        str(facts["reason"]), before.bytes_after, after, before.bytes_after * TRAINING_BYTES, {}, before.model,
        left.after, left.reshaped, left.factored,
    )  # fmt: skip


def _check_text(step: Step) -> None:
    entry, _ = build(step.family, step.method, dict(step.options))
    if step.statistics is not None and step.sequential:
        raise BadInput(f"statistics {step.statistics} are of the untouched model; sequential measures anew: give data instead")
    if step.statistics is not None:
        found = open_calibration(step.statistics)
        check_needs(entry, found)
        if step.domain is not None and step.domain not in found.header.domains:
            raise BadInput(f"{step.statistics} has no domain {step.domain!r}: {', '.join(found.header.domains) or 'none'}")
        return
    if not entry.needs:
        return
    if step.data is None:
        check_needs(entry, None)
        return
    domains = {document.domain for document in read_documents(step.data)} if step.domain is not None else set()
    if step.domain is not None and step.domain not in domains:
        raise BadInput(f"{step.data} has no text of domain {step.domain!r}: it has {', '.join(sorted(domains))}")
    data_files(step.data)


def run_recipe(
    model: str | Path,
    out: str | Path,
    steps: list[Step],
    *,
    trainer: Trainer | None = None,
    train: Train | None = None,
    resume: bool = False,
    progress: Progress = lambda what, done, total: None,
    **how: Any,
) -> dict[str, Any]:
    """Run the steps on `model` and write the result to `out`. `how`: see `moesaic.load`.

    `trainer` runs trained steps, `train` (training/finetune.py) the training inside a conversion.

    Returns out, steps (method, seconds, bytes_after of each), bytes_before, bytes_after, seconds, peak_bytes, stock. Raises
    BadInput before the first step where anything of any step can be known to fail; the input is never touched.
    """
    keep_few()
    began, out = time.perf_counter(), Path(out)
    steps = _taught(model, steps)
    plans = plan_recipe(model, steps, trainer, **how)
    source = plans[0].source
    check_out(out, source, max(plan.bytes_after for plan in plans))
    work = out.with_name(out.name + ".steps")
    done = _resumed(work, source, steps, resume)
    current, rows = source if not done else work / str(len(done)), list(done)
    for number, step in enumerate(steps, 1):
        if number <= len(done):
            continue
        since, target = time.perf_counter(), out if number == len(steps) else work / str(number)
        if step.family in LAYERWISE and not step.trains:
            row = _layerwise(step, current, target, work / f"statistics-{number}", resume, progress, how)
        elif step.family in FOLDERS:
            row = _converted(step, current, target, work / f"statistics-{number}", resume, progress, train, how)
        else:
            assert trainer is not None
            if target.parent != work:
                target.parent.mkdir(parents=True, exist_ok=True)
            report = trainer(step, current, target, resume=resume)
            row = {"bytes_after": report["bytes_after"], "stock": report["stock"], "after": report.get("after", {})}
        rows.append({"method": step.name, "options": step.options, "seconds": time.perf_counter() - since, **row})
        if number < len(steps):
            write_atomically(work / "done.json", json.dumps(rows))
        if current != source:
            shutil.rmtree(current)
        current = target
    shutil.rmtree(work, ignore_errors=True)
    if len(steps) > 1:  # one card for all, whatever the last step wrote
        write_notes(out, source.name, read_history(out))
    return {
        "out": str(out), "model": str(model), "steps": rows, "bytes_before": plans[0].bytes_before,
        "bytes_after": rows[-1]["bytes_after"], "seconds": time.perf_counter() - began,
        "peak_bytes": peak_bytes(), "stock": rows[-1]["stock"],
    }  # fmt: skip


def _resumed(work: Path, source: Path, steps: list[Step], resume: bool) -> list[dict[str, Any]]:
    """What of the recipe is done already."""
    note = json.dumps({"source": str(source.resolve()), "steps": [asdict(step) for step in steps]}, sort_keys=True)
    if work.exists() and not resume:
        raise BadInput(f"{work} is of a recipe that was broken off: pass --resume, or delete it")
    if work.exists() and (work / "recipe.json").is_file():
        if (work / "recipe.json").read_text() != note:
            raise BadInput(f"{work} was begun with other steps or from another model: delete it")
        held = work / "done.json"
        return json.loads(held.read_text()) if held.is_file() else []
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(work / "recipe.json", note)
    return []


def _layerwise(
    step: Step, source: Path, target: Path, statistics: Path, resume: bool, progress: Progress, how: dict[str, Any]
) -> dict[str, Any]:
    entry, _ = build(step.family, step.method, dict(step.options))
    calibration = text = None
    if step.sequential:
        text = _text(step, entry)
    elif entry.needs:
        if step.statistics is not None:
            calibration = open_calibration(step.statistics)
        elif statistics.is_dir() and open_calibration(statistics).header.progress.get("complete"):
            calibration = open_calibration(statistics)
        else:
            calibration = _calibrated(step, entry, source, statistics, progress, how)
    apart = calibration is not None and step.domain in calibration.header.domains
    keep = step.domain if apart or (text is not None and text.by_domain) else None
    report = operate(
        source, target, step.family, step.method, dict(step.options), calibration=calibration, domain=keep,
        sequential=text, resume=resume and target.with_name(target.name + ".partial").is_dir(),
        history=read_history(source), progress=progress, **how,
    )  # fmt: skip
    if step.statistics is None and statistics.is_dir():
        shutil.rmtree(statistics)
    return {"bytes_after": report.bytes_after, "read_bytes": report.read_bytes, "stock": report.stock, "blocks": report.blocks}


def _converted(
    step: Step, source: Path, target: Path, statistics: Path, resume: bool, progress: Progress, train: Train | None,
    how: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    if target.parent != Path() and not target.parent.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
    method, told = build_conversion(step.method, dict(step.options)), Told(train=train, **how)
    if step.statistics is not None:
        told.statistics = open_calibration(step.statistics)
    elif method.takes == "moe" and step.data is not None:
        told.statistics = measure(
            source, _documents(step), statistics, ["R0"], context=step.context, source=step.data, resume=statistics.is_dir(),
            progress=lambda done, total: progress("calibrating", done, total), **how,
        )  # fmt: skip
    elif step.data is not None:
        for document in _documents(step):
            told.texts.setdefault(str(document.domain), []).append(document)
    told.seq_len = step.context or told.seq_len
    report = convert(
        [source, *step.models], target, step.method, dict(step.options), told=told,
        resume=resume and target.with_name(target.name + ".partial").is_dir(), history=read_history(source),
        progress=progress, **how,
    )  # fmt: skip
    return {"bytes_after": report.bytes_after, "read_bytes": report.read_bytes, "stock": report.stock}


def _text(step: Step, entry: registry.Entry) -> Text:
    """What a step is calibrated on."""
    assert step.data is not None
    found = [each for each in read_documents(step.data) if step.domain in (None, each.domain) or step.by_domain]
    source = step.data if step.domain is None else f"{step.data} ({step.domain})"
    documents = list(select(found, step.max_bytes, None))
    return Text(documents, source, step.context, step.by_domain or "D" in entry.needs, step.every)


def _calibrated(step: Step, entry: registry.Entry, source: Path, out: Path, progress: Progress, how: dict[str, Any]) -> Any:
    text, tiers = _text(step, entry), sorted({"R0", *entry.needs} - {"D"})
    return measure(
        source, text.documents, out, tiers, by_domain=text.by_domain, context=text.context, every=text.every,
        source=text.source, resume=out.is_dir(), progress=lambda done, total: progress("calibrating", done, total), **how,
    )  # fmt: skip
