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


class Broken(BadInput):
    """A checkpoint whose files are missing or cut short."""


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any]) -> Path:
    """Write `folder/step-N` (weights, optimiser moments, random state, `extra`), then drop all but the last two."""
    final = folder / f"step-{step:06d}"
    scratch = folder / f".{final.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_file({k: v.detach().contiguous() for k, v in _tensors(model).items()}, scratch / "model.safetensors")
    state = optimizer.state_dict()["state"]
    moments = {f"{i}.{key}": value.contiguous() for i, entry in state.items() for key, value in entry.items()}
    moments["rng"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        moments["rng_cuda"] = torch.cuda.get_rng_state()
    save_file(moments, scratch / "optimizer.safetensors")
    (scratch / "state.json").write_text(json.dumps({"step": step, **extra}))
    for file in scratch.iterdir():
        _sync(file)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(scratch, final)
    for old in newest_first(folder)[2:]:
        shutil.rmtree(old)
    return final


def newest_first(folder: Path) -> list[Path]:
    """Checkpoints of a run; what was being written when the run died has another name and is not among them."""
    return sorted(folder.glob("step-*"), reverse=True)


def latest(folder: Path) -> Path | None:
    return next(iter(newest_first(folder)), None)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore a checkpoint in place; returns its JSON state.

    Raises Broken naming a file that cannot be read, BadInput for a checkpoint of another model; neither changes the model.
    """
    try:
        weights = load_file(path / "model.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        extra = json.loads((path / "state.json").read_text())
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise Broken(f"{path}: broken checkpoint ({error})") from error
    own = _tensors(model)
    for name in own.keys() | weights.keys():
        ours, theirs = (list(t[name].shape) if name in t else "nothing" for t in (own, weights))
        if ours != theirs:
            raise BadInput(
                f"{path} is of another model: {name} is {theirs} there, {ours} in the config; give another out, or delete it"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    torch.set_rng_state(moments.pop("rng"))
    if "rng_cuda" in moments:
        rng = moments.pop("rng_cuda")
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(rng)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return extra


def _sync(file: Path) -> None:
    """On disk before the rename is: a power cut must not leave a finished name on unfinished bytes."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers; a tied tensor once."""
    once: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        once.setdefault(id(tensor), (name, tensor))
    return dict(once.values())
