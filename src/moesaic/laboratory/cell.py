"""One cell, in a process of its own: train (or resume), measure, write one JSON file."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.core.errors import MoesaicError
from moesaic.core.files import replacing, write_atomically
from moesaic.laboratory import measure
from moesaic.laboratory.plan import Cell
from moesaic.training import build
from moesaic.training.config import TrainConfig
from moesaic.training.trainer import Interrupted, Trainer

LATE = 0.9
"""The earlier of the two checkpoints between which routing should have settled, as a share of the steps."""
ROWS = 32
"""Held-out rows whose routing is looked at."""
PER_DOMAIN = 12_000
"""Characters of every held-out domain that are scored."""
POINTS = 60
"""Points of a curve that are kept."""
STOPPED = 75
"""Exit code of a cell that was told to stop and has saved its state."""


class CellTrainer(Trainer):
    """A Trainer that clocks its steps in processor time and notes the experts of held-out rows late in the run."""

    def __init__(self, config: TrainConfig, late: Path) -> None:
        super().__init__(config, Console(quiet=True))
        self.late = late
        self.step_seconds: list[float] = []
        source = self.train_data if self.valid_data is None else self.valid_data
        self.held_BN: Tensor = source.rows(0, min(ROWS, source.rows_per_epoch))[:, :-1].to(config.device)

    def step(self, step: int) -> dict[str, Any]:
        began = time.process_time()
        record = super().step(step)
        self.step_seconds.append(time.process_time() - began)
        if step + 1 == max(1, int(LATE * self.config.steps)):
            with replacing(self.late, ".safetensors") as scratch:
                save_file(_named(self.expert_sets()), scratch)
        return record

    def expert_sets(self) -> list[Tensor | None]:
        """Of every MoE layer, on the held-out rows, in evaluation; none of a model that shows no routings."""
        self.model.eval()
        with torch.random.fork_rng(devices=[]):
            found = [measure.expert_sets(routing) for routing in measure.routings_of(self.model, self.held_BN)]
        self.model.train()
        return found


def _named(sets: list[Tensor | None]) -> dict[str, Tensor]:
    return {str(layer): on_TE for layer, on_TE in enumerate(sets) if on_TE is not None} or {"none": torch.zeros(1)}


def run_cell(cell: Cell, out: Path, goal: dict[str, Any] | None) -> None:
    """The body of a cell's process: leaves `out/NAME.json`, whose `status` is done or failed, or exits with STOPPED.

    `goal` is the recipe of the model whose FLOPs per token `cell.match` aims at.
    """
    folder = out / f"{cell.key}-{cell.fingerprint}"
    torch.set_num_threads(cell.recipe.get("threads") or 1)
    told = cell.facts
    try:
        told |= {"status": "done", **_trained(cell, folder, out, goal)}
    except Interrupted:
        sys.exit(STOPPED)
    except Exception as error:  # a cell that fails is a result; the sweep goes on
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        known = isinstance(error, MoesaicError)
        told |= {"status": "failed", "error": reason if known else f"{type(error).__name__}: {reason}"}
        told["traceback"] = None if known else traceback.format_exc(limit=-4)
    write_atomically(out / f"{cell.key}.json", json.dumps(told, indent=1) + "\n")


def _trained(cell: Cell, folder: Path, out: Path, goal: dict[str, Any] | None) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    shared = out / "tokens" / cell.tokens_key
    for file in shared.glob("*-tokens.npz"):
        with contextlib.suppress(FileExistsError):
            (folder / file.name).symlink_to(file.resolve())
    changes: dict[str, Any] = {}
    if not cell.recipe.get("tokenizer"):
        changes["tokenizer"] = str(shared / "tokenizer")
    config = cell.config(folder, **changes)
    fitted = None
    if cell.match is not None and goal is not None:
        fitted = _fit(cell, config, goal)
        config = TrainConfig.of(_changed(config, cell.match, fitted), f"cell {cell.name}")
    before = _peak(config.device)
    trainer = CellTrainer(config, folder / "late.safetensors")
    trainer.run()
    results = {**_measured(trainer, config), "memory_mb": round((_peak(config.device) - before) / 2**20, 1)}
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return {"fitted": fitted, "results": results, "curve": curve(log)}


def _measured(trainer: CellTrainer, config: TrainConfig) -> dict[str, Any]:
    model, rows_BN = trainer.model.float(), trainer.held_BN
    seconds = trainer.step_seconds
    tokens = config.batch_size * config.accumulate * config.seq_len
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "valid_loss": trainer.last.get("valid_loss"),
        "train_loss": trainer.last.get("loss"),
        "tokens": config.steps * tokens,
        "seconds": trainer.last.get("seconds"),
        "tokens_per_cpu_second": round(tokens / statistics.median(seconds)) if seconds else None,
    }
    model.eval()
    causal = getattr(model.config, "causal", True)
    if config.valid is not None:
        if causal:
            documents = measure.held_out(config.valid, PER_DOMAIN)
            found["bits_per_byte"] = measure.bits_per_byte(model, trainer.tokenizer, documents, config.seq_len)
        else:
            found["bits_per_byte"] = measure.masked_bits_per_byte(model, trainer.tokenizer, rows_BN)
    if not hasattr(model.config, "moe_layers"):
        return found
    found["flops_per_token"] = measure.flops_per_token(model, rows_BN[:8])
    found |= measure.load(model, measure.routings_of(model, rows_BN))
    late = load_file(trainer.late) if trainer.late.exists() else {}
    after = trainer.expert_sets()
    found["changed"] = measure.changed([late.get(str(layer)) for layer in range(len(after))], after)
    return found


def _fit(cell: Cell, config: TrainConfig, goal: dict[str, Any]) -> int:
    """The value of `cell.match` (a width) that gives the goal's FLOPs per token, each model freshly built."""
    quiet = Console(quiet=True)
    tokenizer = build.build_tokenizer(config, Path(config.out), quiet.print)
    random = torch.Generator().manual_seed(0)
    rows_BN = torch.randint(1, len(tokenizer), (4, config.seq_len), generator=random).to(config.device)
    aim = TrainConfig.of({**goal, "out": config.out, "tokenizer": config.tokenizer}, "base")
    wanted = measure.flops_per_token(_seeded(aim, tokenizer), rows_BN)
    assert cell.match is not None
    width, _ = measure.fit_width(
        lambda value: _seeded(TrainConfig.of(_changed(config, cell.match, value), cell.name), tokenizer), rows_BN, wanted
    )
    return width


def _seeded(config: TrainConfig, tokenizer: Any) -> Any:
    torch.manual_seed(config.seed)
    return build.build_model(config, tokenizer)


def _changed(config: TrainConfig, field: str | None, value: Any) -> dict[str, Any]:
    from moesaic.training.config import set_field

    fields = config.model_dump()
    assert field is not None
    set_field(fields, field, value)
    return fields


def curve(log: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Thin curves of a log: [step, value] of the training loss, the validation loss and the mean MaxVio."""
    every = max(1, len(log) // POINTS)
    thin = [record for i, record in enumerate(log) if i % every == 0 or i == len(log) - 1]
    scored = [record for record in log if record.get("valid_loss") is not None]
    routed = [record for record in thin if record.get("max_vio")]
    return {
        "loss": [[record["step"] + 1, round(record["loss"], 4)] for record in thin],
        "valid": [[record["step"] + 1, round(record["valid_loss"], 4)] for record in scored],
        "max_vio": [[record["step"] + 1, round(statistics.mean(record["max_vio"]), 3)] for record in routed],
    }


def prepare_tokens(cell: Cell, out: Path) -> None:
    """Train the tokenizer and encode the data that a cell reads, once for all cells that read the same."""
    shared = out / "tokens" / cell.tokens_key
    shared.mkdir(parents=True, exist_ok=True)
    config = cell.config(shared)
    tokenizer = build.build_tokenizer(config, shared, Console(quiet=True).print)
    build.build_data(config, "data", tokenizer, shared)
    if config.valid:
        build.build_data(config, "valid", tokenizer, shared)


def _peak(device: str) -> int:
    """Most memory that this process has held, in bytes: on its GPU, or at all."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
