"""`moesaic train CONFIG.yaml`: train a model from a recipe; run it again to resume."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.common import Debug, Json, console, emit, progress_console, single


def train(
    config: Annotated[Path, typer.Argument(help="A YAML recipe; see recipes/ for examples.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a field: --set lr=1e-3 --set model.num_experts=8"),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train, saving checkpoints into the recipe's `out`; the same command resumes from the newest one, exactly."""
    from moesaic.training.config import TrainConfig

    recipe = TrainConfig.read(config, set_ or ())
    from moesaic.cli.loading import quiet_transformers

    quiet_transformers()
    from moesaic.training.trainer import Interrupted, Trainer

    trainer = Trainer(recipe, progress_console)
    try:
        final = trainer.run()
    except Interrupted as stop:
        print(f"moesaic train: {stop}; run the same command to resume", file=sys.stderr)
        raise typer.Exit(130) from None
    trainer.processes.leave()
    if not trainer.processes.first:  # under torchrun one process speaks
        return
    last = trainer.last
    done = {
        "out": str(trainer.out),
        "final": str(final),
        "steps": recipe.steps,
        "tokens": recipe.steps * recipe.batch_size * recipe.accumulate * recipe.seq_len,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "resumed_from": None if trainer.resumed_from is None else str(trainer.resumed_from),
        "loss": last.get("loss"),
        "valid_loss": last.get("valid_loss"),
        "max_vio": last.get("max_vio"),
        "tokens_per_second": last.get("tokens_per_second"),
        "seconds": last.get("seconds"),
    }
    if json:
        emit(done)
    else:
        valid = "" if done["valid_loss"] is None else f", validation loss {done['valid_loss']:.3f}"
        loss = "already done" if done["loss"] is None else f"loss {done['loss']:.3f}{valid}"
        console.print(f"{recipe.steps} steps, {done['tokens']:,} tokens: {loss}; model in {final}")


app = single(train)
