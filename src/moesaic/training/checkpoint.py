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
from moesaic.training.parallel import cut_like, whole
from moesaic.training.processes import Processes


class Broken(BadInput):
    """A checkpoint whose files are missing or cut short."""


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any],
    random: dict[str, Tensor],
    processes: Processes,
) -> Path:
    """Write `folder/step-N` (weights, optimiser moments, `random` states, `extra`), then drop all but the last two.

    Every process calls it; the first one writes, whole tensors, and the others wait until it has.
    """
    final = folder / f"step-{step:06d}"
    weights = weights_of(model)
    state = optimizer.state_dict()["state"]
    moments = {f"{i}.{key}": whole(value).contiguous() for i, entry in state.items() for key, value in entry.items()}
    if processes.first:
        _write(folder, final, weights, {**moments, **random}, {"step": step, **extra})
    processes.wait()
    return final


def _write(folder: Path, final: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], extra: dict[str, Any]) -> None:
    scratch = folder / f".{final.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_file(weights, scratch / "model.safetensors")
    save_file(moments, scratch / "optimizer.safetensors")
    (scratch / "state.json").write_text(json.dumps(extra))
    for file in scratch.iterdir():
        _sync(file)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(scratch, final)
    for old in newest_first(folder)[2:]:
        shutil.rmtree(old)


def newest_first(folder: Path) -> list[Path]:
    """Checkpoints of a run; what was being written when the run died has another name and is not among them."""
    return sorted(folder.glob("step-*"), reverse=True)


def latest(folder: Path) -> Path | None:
    return next(iter(newest_first(folder)), None)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes) -> dict[str, Any]:
    """Restore a checkpoint in place, whatever the number of processes that made it; returns its JSON state.

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
    put_weights(model, weights)
    _put_random({name: moments.pop(name) for name in list(moments) if name.startswith("rng")}, processes)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = cut_like(value, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return extra


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights and buffers by name. A collective where they are shards."""
    return {name: whole(tensor.detach()).contiguous() for name, tensor in _tensors(model).items()}


@torch.no_grad()
def put_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy whole weights into the model's tensors, or into this process's shards of them."""
    for name, tensor in _tensors(model).items():
        tensor.copy_(cut_like(weights[name], tensor))


def _put_random(states: dict[str, Tensor], processes: Processes) -> None:
    """This process's random state; one that the checkpoint has none for keeps the seed it began with."""
    suffix = "" if processes.first else f"_of_{processes.rank}"
    if f"rng{suffix}" in states:
        torch.set_rng_state(states[f"rng{suffix}"])
    if f"rng_cuda{suffix}" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"rng_cuda{suffix}"])


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
