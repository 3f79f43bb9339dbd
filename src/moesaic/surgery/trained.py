"""One trained step, checkpoint in and checkpoint out: what `unlearn`, `distill`, `edit` and a recipe's steps of them call.

The training loop and the scorer come from outside (training/finetune.py, evaluation/bits_per_byte.py): floor 5 does not
import its neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.core import registry
from moesaic.core.documents import Document, read_documents
from moesaic.core.errors import BadInput
from moesaic.surgery import attribution
from moesaic.surgery.live import check_folder, history, write
from moesaic.surgery.objective import Given, Objective, Train, nats
from moesaic.view.load import load

FAMILIES = ("unlearn", "distill", "edit")
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
    teacher: Any = None,
    plan: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Apply one method to a checkpoint and write another.

    Args:
        source: the model that changes (for distill: the student).
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
    steps_before = history(source)
    found = {name: _documents(name, value) for name, value in (texts or {}).items()}
    if training.steps or plan:
        _check_texts(f"{family} {method}", made, found, plan or not made.needs_text)
    model, tokenizer = load(
        source, dtype=dtype, device=device, trust_remote_code=trust_remote_code, dense_ok=family == "distill"
    )
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
    read = {name: list(documents) for name, documents in (held_out or {}).items()}
    report["before"] = _scored(model, tokenizer, read, score)
    context = min(training.seq_len, longest or training.seq_len)
    routed = _routed(model, tokenizer, read, context)
    given = Given(tokenizer, found, training.seq_len, training.seed, training.steps, teacher)
    report["steps"] = []
    for name, objective, share in made.stages():
        steps = round(training.steps * share)
        torch.manual_seed(training.seed)
        since = time.perf_counter()
        parameters = objective.prepare(model, given)
        row: dict[str, Any] = {"method": f"{family} {method}: {name}", "steps": 0}
        row["parameters_trained"] = sum(p.numel() for p in parameters)
        if steps:
            say(f"{name}: {row['parameters_trained']:,} parameters learn for {steps} steps")
            losses = train(
                model, tokenizer, _batches(objective, found), parameters, objective=objective.loss, steps=steps,
                lr=training.lr, batch_size=training.batch_size, seq_len=training.seq_len, seed=training.seed,
                stop=_stop(model, tokenizer, read.get("forget") or found.get("forget"), training),
                progress=lambda step, loss: say(f"step {step}  loss {loss:.3f}") if step % 10 == 0 else None,
            )  # fmt: skip
            row |= {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]}
        model = objective.finish(model)
        row |= objective.facts()
        report["steps"].append({**row, "seconds": time.perf_counter() - since})
    report["after"] = _scored(model, tokenizer, read, score)
    report["router_overlap"] = _overlaps(routed, _routed(model, tokenizer, read, context))
    report["bytes_after"] = _bytes(model)
    step |= {"source": str(source), "stages": report["steps"]}
    write(model, tokenizer, out, {"steps": [*steps_before, step]}, _card(report))
    report["seconds"] = time.perf_counter() - began
    return report


def _documents(name: str, value: Any) -> Any:
    if isinstance(value, str | Path):
        found = list(read_documents(value))
        if not any(document.text.strip() for document in found):
            raise BadInput(f"{name}: {value} holds no text")
        return found
    return value


def _check_texts(what: str, made: Objective, found: Mapping[str, Any], optional: bool) -> None:
    wanted = list(dict.fromkeys(name for _, stage, _ in made.stages() for name in stage.texts))
    missing = [name for name in wanted if name not in found or (isinstance(found[name], list) and not found[name])]
    if missing and not optional:
        raise BadInput(f"{what} trains on {' and '.join(wanted)}: there is no {missing[0]} text")


def _batches(objective: Objective, found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in objective.texts}


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


def _stop(model: Any, tokenizer: Any, text: list[Document] | None, training: Training) -> Callable[[int], bool]:
    """Whether the text to forget has been forgotten as far as `until` asks; looked at now and then."""
    until = training.until
    if until is None:
        return lambda done: False
    if not text:
        raise BadInput(f"until {until}: there is no forget text to measure")
    measure = first_nats(model, tokenizer, text, training.seq_len)
    return lambda done: done % PROBE_EVERY == 0 and measure() >= until


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
