"""Unlearning measured: SEUF with each of its losses against the same loss on the whole model, stopped at equal forget loss.

Two things to forget: a domain that the model was trained on, and facts that are planted first. Every cell starts from the
same checkpoint, is stopped when the text to forget costs `rise` nats per token more than before, and is written and read
again by `run_step` as `moesaic unlearn` does.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moesaic.bench import facts, machine
from moesaic.core.documents import Document, read_documents, select
from moesaic.core.errors import BadInput
from moesaic.evaluation.bits_per_byte import report, score_documents
from moesaic.surgery.live import write
from moesaic.surgery.trained import Training, first_nats, run_step
from moesaic.training.finetune import finetune
from moesaic.view import load, resolve_model

LOSSES: dict[str, dict[str, Any]] = {"ga": {}, "graddiff": {}, "npo": {"beta": 0.01}, "rmu": {}}
"""NPO's 0.1 stands still once a row of 128 tokens is 10 nats less likely, 0.08 nats per token: short of any forgetting."""


@dataclass(frozen=True)
class Options:
    model: str = "bundled"
    data: str = "../shared/data/corpus"
    task: str = "domain"
    """domain or facts."""
    domain: str = "python"
    rise: float = 0.5
    steps: int = 100
    lr: float = 3e-3
    lr_full: float = 3e-4
    """Of ga, graddiff and npo on the whole model; rmu, which trains a few matrices, takes `lr`."""
    batch_size: int = 4
    seq_len: int = 128
    seeds: int = 2
    losses: tuple[str, ...] = tuple(LOSSES)
    people: int = 40
    plant_steps: int = 150
    train_bytes: int = 100_000
    valid_bytes: int = 3000


def run(options: Options, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Rows of every method, scope and seed; see `moesaic bench unlearn`."""
    if options.task not in ("domain", "facts"):
        raise BadInput(f"--task {options.task}: domain or facts")
    header = machine.describe()
    train = select(read_documents(Path(options.data) / "train"), options.train_bytes)
    valid = select(read_documents(Path(options.data) / "valid"), options.valid_bytes)
    with tempfile.TemporaryDirectory(prefix="moesaic-unlearn-") as folder:
        source = resolve_model(options.model)
        known: list[facts.Person] = []
        if options.task == "facts":
            known = facts.people(options.people)
            source = _planted(source, Path(folder) / "planted", known, train, options, progress)
            forgotten, kept = known[: len(known) // 2], known[len(known) // 2 :]
            texts = {"forget": facts.told(forgotten, "forgotten"), "retain": [*facts.told(kept, "kept"), *train]}
            held_out = {"forget": texts["forget"], "kept": facts.told(kept, "kept"), "retain": valid}
        else:
            texts, held_out = (
                {name: list(_of(found, options.domain, name)) for name in ("forget", "retain")} for found in (train, valid)
            )
            if not texts["forget"]:
                raise BadInput(f"{options.data} has no domain {options.domain!r}")
        rows = [
            _cell(options, source, Path(folder), texts, held_out, known, loss, scope, seed, progress)
            for seed in range(options.seeds)
            for loss in options.losses
            for scope in ("expert", "all")
        ]
    return {"machine": header, "options": asdict(options), "rows": rows}


def _of(documents: list[Document], domain: str, name: str) -> list[Document]:
    return [d for d in documents if (d.domain == domain) == (name == "forget")]


def _planted(
    source: Any, out: Path, known: list[facts.Person], train: list[Document], options: Options, progress: Callable[[str], None]
) -> Path:
    """The model after it has learnt the facts, among texts of its own corpus."""
    progress("planting the facts")
    model, tokenizer = load(source)
    told = facts.told(known, "facts", times=3)
    rest = select(train, options.train_bytes // 10)

    def objective(live: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids_BN = torch.cat([batch["told"], batch["rest"]])
        return live(input_ids=ids_BN, labels=ids_BN, use_cache=False).loss

    finetune(
        model, tokenizer, {"told": told, "rest": rest}, model.parameters(), objective=objective, steps=options.plant_steps,
        lr=1e-3, batch_size=options.batch_size, seq_len=options.seq_len,
    )  # fmt: skip
    write(model, tokenizer, out)
    return out


def _cell(
    options: Options, source: Any, folder: Path, texts: dict[str, list[Document]], held_out: dict[str, list[Document]],
    known: list[facts.Person], loss: str, scope: str, seed: int, progress: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    name = f"{'seuf' if scope == 'expert' else 'full'} {loss}"
    progress(f"{options.task}: {name}, seed {seed}")
    model, tokenizer = load(source)
    began = first_nats(model, tokenizer, held_out["forget"], options.seq_len)()
    out, since = folder / f"{loss}-{scope}-{seed}", time.perf_counter()
    how = {"loss": loss, "loss_options": LOSSES[loss]} if scope == "expert" else LOSSES[loss]
    full = scope == "all"
    done = run_step(
        source, out, family="unlearn", method=loss if full else "seuf", options=how, train=finetune, texts=texts,
        held_out=held_out, score=partial(_score, options.seq_len),
        training=Training(
            steps=options.steps, lr=options.lr_full if full and loss != "rmu" else options.lr, batch_size=options.batch_size,
            seq_len=options.seq_len, seed=seed, until=began + options.rise,
        ),
    )  # fmt: skip
    after, tokenizer = load(out)
    step = done["steps"][0]
    row: dict[str, Any] = {
        "impl": name, "seed": seed, "steps": step["steps"], "parameters": step["parameters_trained"],
        "edited": step.get("edited"), "forget_nats_before": began,
        "forget_nats": first_nats(after, tokenizer, held_out["forget"], options.seq_len)(),
        "before": {key: value["bits_per_byte"] for key, value in done["before"].items()},
        "after": {key: value["bits_per_byte"] for key, value in done["after"].items()},
        "router_overlap": done["router_overlap"], "seconds": time.perf_counter() - since,
    }  # fmt: skip
    if known:
        half = len(known) // 2
        row["recall_before"] = {
            "forget": facts.recall(model, tokenizer, known[:half]),
            "kept": facts.recall(model, tokenizer, known[half:]),
        }
        row["recall"] = {
            "forget": facts.recall(after, tokenizer, known[:half]),
            "kept": facts.recall(after, tokenizer, known[half:]),
        }
    return row


def _score(context: int, model: Any, tokenizer: Any, documents: list[Document]) -> dict[str, Any]:
    return {"bits_per_byte": report("", score_documents(model, tokenizer, documents, context=context))["bits_per_byte"]}
