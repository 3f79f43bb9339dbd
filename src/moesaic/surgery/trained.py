"""One trained step, checkpoint in and checkpoint out: what `unlearn`, `distill`, `edit`, a `compress` with a text to train on,
and a recipe's steps of them call.

The training loop and the scorer come from outside (training/finetune.py, evaluation/bits_per_byte.py): floor 5 does not
import its neighbours.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moesaic.core import registry
from moesaic.core.documents import Document, read_documents
from moesaic.core.errors import BadInput
from moesaic.core.files import write_atomically
from moesaic.surgery import attribution
from moesaic.surgery.card import read_history
from moesaic.surgery.layer import Method
from moesaic.surgery.live import check_folder, write
from moesaic.surgery.objective import Given, Objective, Stage, Train, nats
from moesaic.view.load import load

FAMILIES = ("unlearn", "distill", "edit", "compress")
PROBE_EVERY = 2
"""Steps between two looks at the text that `until` is about."""

PROBE_TOKENS = 2048

Score = Callable[[Any, Any, list[Document]], dict[str, Any]]
"""score(model, tokenizer, documents) -> at least bits_per_byte."""


@dataclass(frozen=True)
class Training:
    """How long and how fast. `until`: stop at this many nats per token on the text to forget: the held-out one if there is
    one, in rows of `seq_len` tokens."""

    steps: int = 100
    lr: float = 1e-4
    batch_size: int = 4
    seq_len: int = 256
    seed: int = 0
    until: float | None = None

    def check(self) -> None:
        if self.steps < 0 or self.batch_size < 1 or self.seq_len < 2 or self.lr <= 0:
            raise BadInput(f"steps {self.steps}, batch_size {self.batch_size}, seq_len {self.seq_len}, lr {self.lr}: too small")


def build(family: str, method: str, options: Mapping[str, Any]) -> Objective:
    """A registered method from its options. Raises BadInput, or UnknownMethod, naming what is wrong."""
    if family not in FAMILIES:
        raise BadInput(f"family {family!r} does not train: one of {', '.join(FAMILIES)}")
    entry = registry.get(family, method)
    try:
        made = entry.build(**options)
    except TypeError as error:
        raise BadInput(f"{family} {method}: {error}; its options are {', '.join(entry.parameters) or 'none'}") from error
    if isinstance(made, Method):
        objective = made.objective()
        if objective is None:
            raise BadInput(f"{family} {method} does not train: `distill recover` trains what it leaves")
        return objective
    assert isinstance(made, Objective), f"{family} {method} is no Objective"
    return made


def run_step(
    source: str | Path,
    out: Path | None,
    *,
    family: str,
    method: str,
    train: Train,
    options: Mapping[str, Any] | None = None,
    texts: Mapping[str, Any] | None = None,
    held_out: Mapping[str, Iterable[Document]] | None = None,
    score: Score | None = None,
    training: Training | None = None,
    teacher: str | Path | None = None,
    resume: bool | None = None,
    plan: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Apply one method to a checkpoint and write another.

    Args:
        source: the model that changes. For distill the student: a checkpoint, or a .json file of config fields.
        teacher: the checkpoint to learn from; distill needs one, compress takes the model itself without.
        resume: keep the state of the training in a folder beside `out` while it runs (False), and go on from it where there
            is one (True); a training that is broken off is lost with None.
        out: the folder to write; not there yet, or empty. None with `plan`.
        train: the loop, as training.finetune.finetune.
        texts: what it trains on, by the names that the method asks for: a path, or documents.
        held_out: texts that `score` reads before and after, by name.
        plan: say what would be done, and do nothing.

    Returns the report: the plan's facts, `before` and `after` by held-out text, `router_overlap`, the steps and their
    seconds, bytes. Raises BadInput before anything is trained where that can be known, and leaves `source` untouched.
    """
    training, began = training or Training(), time.perf_counter()
    made = build(family, method, options or {})
    training.check()
    if out is not None:
        check_folder(out)
    work = (
        None if out is None or plan or resume is None else _work(out, source, family, method, options, training, bool(resume))
    )
    steps_before = read_history(Path(source))
    found = {name: _documents(name, value, made) for name, value in (texts or {}).items()}
    _check_texts(f"{family} {method}", made, found, plan or not (training.steps or made.needs_text))
    how: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    model, tokenizer, given = _opened(source, teacher, family, how)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if training.steps and longest is not None and training.seq_len > longest:
        raise BadInput(f"seq_len {training.seq_len}: this model takes {longest} tokens")
    facts = made.plan(model)
    step = {"family": family, "method": method, "options": dict(options or {}), "training": asdict(training)}
    report: dict[str, Any] = {"out": None if out is None else str(out), "model": str(source), **step, **facts}
    report["loads_with"] = "transformers" if facts["stock"] else "transformers after `import moesaic`"
    report["bytes_before"] = _bytes(model)
    if plan or out is None:
        return report
    for name, reader in made.readers.items():
        if isinstance(found.get(name), str | Path):
            found[name] = reader(found[name], tokenizer, training.seq_len)
    read = {name: list(documents) for name, documents in (held_out or {}).items()}
    report["before"] = _scored(model, tokenizer, read, score)
    context = min(training.seq_len, longest or training.seq_len)
    routed = _routed(model, tokenizer, read, context)
    given = replace(given, texts=found, seq_len=training.seq_len, seed=training.seed, steps=training.steps)
    stop = _stop_text(read.get("forget") or found.get("forget"), training)
    report["steps"] = []
    stages = made.stages()
    for number, stage in enumerate(stages):
        snapshot = None if work is None else work / f"stage-{number}.safetensors"
        model, row = _stage(f"{family} {method}", stage, model, given, training, train, stop, say, snapshot)
        report["steps"].append(row)
        if number + 1 < len(stages) and row["steps"]:
            row["after"] = _scored(model, tokenizer, read, score)
    report["after"] = _scored(model, tokenizer, read, score)
    report["router_overlap"] = _overlaps(routed, _routed(model, tokenizer, read, context))
    report["bytes_after"] = _bytes(model)
    step |= {"source": str(source), "stages": report["steps"], "bytes_after": report["bytes_after"], "stock": facts["stock"]}
    write(model, tokenizer, out, {"steps": [*steps_before, step]}, _card(report))
    if work is not None:
        shutil.rmtree(work)
    report["seconds"] = time.perf_counter() - began
    return report


def _work(out: Path, source: Any, family: str, method: str, options: Any, training: Training, resume: bool) -> Path:
    """The folder of a training under way. Raises BadInput for one that is there and was not asked for, or is another's."""
    work = out.with_name(out.name + ".training")
    files = sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []
    made_of = [str(source), [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]]
    note = json.dumps([made_of, family, method, dict(options or {}), asdict(training)], sort_keys=True, default=str)
    if (work / "step.json").is_file() and any(work.glob("stage-*")):  # else nothing was trained
        if not resume:
            raise BadInput(f"{work} is of a training that was broken off: pass --resume, or delete it")
        if (work / "step.json").read_text() != note:
            raise BadInput(f"{work} was begun with other options or from another model: delete it")
        return work
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(work / "step.json", note)
    return work


def _stage(
    what: str, stage: Stage, model: Any, given: Given, training: Training, train: Train, stop: Any, say: Callable[[str], None],
    snapshot: Path | None,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """Prepare, train and finish one stage; the model that comes out, and a row of the report."""
    objective, steps, since = stage.objective, round(training.steps * stage.share), time.perf_counter()
    torch.manual_seed(training.seed)
    model = objective.convert(model, given)
    parameters = objective.prepare(model, given)
    row: dict[str, Any] = {"method": f"{what}: {stage.name}", "steps": 0}
    row["parameters_trained"] = sum(p.numel() for p in parameters)
    if steps:
        say(f"{stage.name}: {row['parameters_trained']:,} parameters learn for {steps} steps")
        losses = train(
            model, given.tokenizer, {name: given.texts[name] for name in objective.texts}, parameters,
            objective=objective.loss, steps=steps, lr=training.lr * stage.lr, batch_size=training.batch_size,
            seq_len=training.seq_len, seed=training.seed, stop=stop(model, given.tokenizer),
            progress=lambda step, loss: say(f"step {step}  loss {loss:.3f}") if step % 10 == 0 else None,
            after=objective.stepped, snapshot=snapshot, state=objective,
        )  # fmt: skip
        row |= {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]}
    model = objective.finish(model)
    return model, {**row, **objective.facts(), "seconds": time.perf_counter() - since}


def _opened(source: str | Path, teacher: str | Path | None, family: str, how: Mapping[str, Any]) -> tuple[Any, Any, Given]:
    """The model to change, its tokenizer, and the teacher. Raises BadInput where the two do not read alike."""
    if teacher is None and family != "distill":
        model, tokenizer = load(source, **how)
        return model, tokenizer, Given(tokenizer)
    if teacher is None:
        raise BadInput("distill needs a teacher: the model to learn from")
    taught, tokens = load(teacher, dense_ok=True, **how)
    if Path(source).suffix == ".json" and Path(source).is_file():
        model, tokenizer = fresh(Path(source), tokens, how.get("device")), tokens
    else:
        model, tokenizer = load(source, dense_ok=True, **how)
        tokenizer = tokens if tokenizer is None else tokenizer
    if tokens is None:
        raise BadInput(f"{teacher} has no tokenizer, which teacher and student share")
    if tokenizer.get_vocab() != tokens.get_vocab():
        raise BadInput(f"{source} and {teacher} have different tokenizers: a student learns from logits of the same tokens")
    taught.requires_grad_(False)
    return model, tokenizer, Given(tokenizer, teacher=taught.eval())


def fresh(file: Path, tokenizer: Any, device: str | None = None) -> Any:
    """A model with initial weights from a file of transformers config fields, `model_type` among them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        fields = json.loads(file.read_text())
        kind = fields.pop("model_type")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{file}: a JSON object of config fields with model_type ({error})") from error
    given = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, **fields}
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given))
    except Exception as error:  # transformers' validators raise classes of their own
        raise BadInput(f"{file}: {' '.join(str(error).split())[:300]}") from error
    return model.to(device or "cpu").eval()


def _documents(name: str, value: Any, made: Objective) -> Any:
    if isinstance(value, str | Path) and name in made.readers:
        if not Path(value).exists():
            raise BadInput(f"{name}: no such file: {value}")
        return value
    if isinstance(value, str | Path):
        found = list(read_documents(value))
        if not any(document.text.strip() for document in found):
            raise BadInput(f"{name}: {value} holds no text")
        return found
    return value


def _check_texts(what: str, made: Objective, found: Mapping[str, Any], optional: bool) -> None:
    wanted = list(dict.fromkeys(name for stage in made.stages() for name in stage.objective.texts))
    missing = [name for name in wanted if name not in found or (isinstance(found[name], list) and not found[name])]
    if missing and not optional:
        raise BadInput(f"{what} trains on {' and '.join(wanted)}: there is no {missing[0]} text")


def first_nats(model: Any, tokenizer: Any, documents: Iterable[Document], seq_len: int) -> Callable[[], float]:
    """Measures nats per token of the first rows of a text, in evaluation: what `until` looks at."""
    start = tokenizer.eos_token_id
    ids = [t for d in documents for t in (start, *tokenizer(d.text, add_special_tokens=False)["input_ids"])]
    count = max(1, min(PROBE_TOKENS, len(ids)) // seq_len)
    rows_BN = torch.tensor(ids[: count * seq_len]).reshape(count, -1)

    @torch.no_grad()
    def measure() -> float:
        was, device = model.training, next(model.parameters()).device
        model.eval()
        with torch.autocast(device.type, torch.bfloat16):
            now = float(nats(model, rows_BN.to(device)))
        model.train(was)
        return now

    return measure


def _stop_text(text: list[Document] | None, training: Training) -> Callable[[Any, Any], Callable[[int], bool]]:
    """Of a model: whether the text to forget has been forgotten as far as `until` asks; looked at now and then."""
    until = training.until
    if until is None:
        return lambda model, tokenizer: lambda done: False
    if not text:
        raise BadInput(f"until {until}: there is no forget text to measure")

    def of(model: Any, tokenizer: Any) -> Callable[[int], bool]:
        measure = first_nats(model, tokenizer, text, training.seq_len)
        return lambda done: done % PROBE_EVERY == 0 and measure() >= until

    return of


def _scored(model: Any, tokenizer: Any, texts: Mapping[str, list[Document]], score: Score | None) -> dict[str, Any]:
    return {} if score is None else {name: score(model, tokenizer, documents) for name, documents in texts.items()}


def _routed(model: Any, tokenizer: Any, texts: Mapping[str, list[Document]], context: int) -> dict[str, Any]:
    from moesaic.core.errors import NotMoE

    try:
        return {name: attribution.choices(model, tokenizer, documents, context) for name, documents in texts.items()}
    except NotMoE:
        return {}


def _overlaps(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """By text, the share of choices that stayed; nothing where the layers or their experts are others now."""
    same = [name for name in before if name in after and before[name].keys() == after[name].keys()]
    return {name: attribution.overlap(before[name], after[name]) for name in same}


def _bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _card(report: Mapping[str, Any]) -> str:
    """A model card: what it was, what was done, what loads it, what was measured."""
    options = ", ".join(f"{key}={value}" for key, value in report["options"].items())
    lines = [
        f"# {report['model']}, after {report['family']} {report['method']}", "",
        f"Made by `moesaic {report['family']}` ({report['method']}{': ' + options if options else ''}). "
        f"It loads with {report['loads_with']}: {report['reason']}. Trained: {report['trains']}.", "",
    ]  # fmt: skip
    if report["after"]:
        lines += ["| Held-out text | Bits per byte before | after |", "|---|---|---|"]
        for name, after in report["after"].items():
            lines.append(f"| {name} | {report['before'][name]['bits_per_byte']:.4f} | {after['bits_per_byte']:.4f} |")
    return "\n".join(lines) + "\n"
