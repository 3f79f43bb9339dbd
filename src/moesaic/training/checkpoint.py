"""Checkpoints that resume exactly: safetensors and JSON, no pickle, written beside and renamed into place."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moesaic.core.errors import BadInput


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any]) -> Path:
    """Write `folder/step-N` (weights, optimiser moments, random state, `extra`), then drop the older ones."""
    final = folder / f"step-{step:06d}"
    scratch = folder / f".{final.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_file({k: v.detach().contiguous() for k, v in _tensors(model).items()}, scratch / "model.safetensors")
    state = optimizer.state_dict()["state"]
    moments = {f"{i}.{key}": value.contiguous() for i, entry in state.items() for key, value in entry.items()}
    moments["rng"] = torch.get_rng_state()
    save_file(moments, scratch / "optimizer.safetensors")
    (scratch / "state.json").write_text(json.dumps({"step": step, **extra}))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(scratch, final)
    for old in sorted(folder.glob("step-*"))[:-2]:
        shutil.rmtree(old)
    return final


def latest(folder: Path) -> Path | None:
    found = sorted(folder.glob("step-*"))
    return found[-1] if found else None


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore a checkpoint in place; returns its JSON state. Raises BadInput naming a broken file."""
    try:
        weights = load_file(path / "model.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        extra = json.loads((path / "state.json").read_text())
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise BadInput(f"{path}: broken checkpoint ({error}); delete it to resume from the one before") from error
    own = _tensors(model)
    if own.keys() != weights.keys() or any(own[k].shape != weights[k].shape for k in own):
        raise BadInput(f"{path}: the checkpoint is of another model than the config describes")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    torch.set_rng_state(moments.pop("rng"))
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return extra


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers; a tied tensor once."""
    once: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        once.setdefault(id(tensor), (name, tensor))
    return dict(once.values())
