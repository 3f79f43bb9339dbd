"""Conversions whose result is a live model: dense models in memory, parts of ours put in, written and read back whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.models.upcycled.classes import upcycled_config
from moesaic.surgery.conversion import Conversion, Outcome, Told
from moesaic.surgery.dense import Dense
from moesaic.surgery.live import write
from moesaic.view.load import load


class Living(Conversion):
    """Base: `spec` says what is put in, `make` gives it its weights."""

    def spec(self, models: Sequence[Dense]) -> dict[str, Any]:
        """Of the configuration: `method` and sizes. Raises BadInput for what does not fit."""
        raise NotImplementedError

    def make(self, models: Sequence[Dense], told: Told) -> Any:
        """The live model."""
        raise NotImplementedError

    def grows(self, models: Sequence[Dense]) -> int:
        """Bytes of the result, about."""
        return sum(model.table.nbytes for model in models)

    def plan(self, models: Sequence[Dense]) -> Outcome:
        self.spec(models)
        size = self.grows(models)
        reason = f"{models[0].config.model_type} with parts of ours: needs `import moesaic` before it loads"
        return Outcome(None, reason, False, size, 2 * size + sum(model.table.nbytes for model in models))

    def write(self, models: Sequence[Dense], out: Path, told: Told, step: dict[str, Any], history: Sequence[dict]) -> int:
        made = self.make(models, told).eval()
        size = sum(p.numel() * p.element_size() for p in made.parameters())
        card = (
            f"# {models[0].folder.name}, upcycled by {step['method']}\n\nMade by `moesaic upcycle` of "
            f"{', '.join(model.folder.name for model in models)}. It loads with transformers after `import moesaic`.\n"
        )
        recipe = {"steps": [*history, {**step, "bytes_after": size}]}
        write(made, tokenizer_or_none(models[0]), out, recipe, card)
        return size


def tokenizer_or_none(dense: Dense) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(dense.folder, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return None


def opened(dense: Dense) -> Any:
    """The dense model in memory."""
    return load(dense.folder, dense_ok=True).model


def build(models: Sequence[Dense], spec: dict[str, Any]) -> Any:
    """A model with `spec` put in and initial weights, in the first one's dtype."""
    from transformers import AutoModelForCausalLM

    config = upcycled_config(opened(models[0]).config, spec)
    made = AutoModelForCausalLM.from_config(config)
    return made.to(models[0].ffn(0)["gate"].dtype)


def averaged(states: Sequence[dict[str, Tensor]], name: str) -> Tensor:
    """A tensor's mean over models, in float64; of equal ones, itself."""
    held = [state[name] for state in states]
    return (torch.stack([each.double() for each in held]).sum(0) / len(held)).to(held[0].dtype)
