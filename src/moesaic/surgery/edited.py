"""A block after a change, in memory: the tensors that a model of the new sizes has there."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.surgery.checkpoint import Checkpoint
from moesaic.surgery.layer import Change
from moesaic.view.bank import ExpertWeights
from moesaic.view.block import Block


def edited(checkpoint: Checkpoint, i: int, change: Change, blank: Block, matrix: str | None = None) -> dict[str, Tensor]:
    """Every tensor of block i by its name, after the change (`Change.through` the map of its rows).

    Args:
        blank: the block in a model of the new sizes, which may be without memory: it says how experts lie.
        matrix: the name of the router's matrix; needed only where `change.matrix_RD` is given.
    """
    facts, keep = checkpoint.facts[i], list(change.keep)
    fresh = sorted(change.experts)
    names = checkpoint.matrices[i]
    shapes = [getattr(blank.experts, name.rpartition(".")[2]).shape for name in names]
    same = all(shape[1:] == source.shape for shape, source in zip(shapes, checkpoint.sources[i], strict=True))
    if same:
        read = checkpoint.bank(i, keep)
    else:
        if len(fresh) < len(keep):
            raise ValueError(f"{facts.name}: experts of another width, and {len(keep) - len(fresh)} of them not given")
        read = [torch.empty(shape, dtype=checkpoint.own[name].dtype) for shape, name in zip(shapes, names, strict=True)]
    found = dict(zip(names, read, strict=True)) | rest(checkpoint, i, change, matrix)
    prefix = names[1].rpartition(".")[0]
    for name in [] if same else _names_under(checkpoint, i):  # biases along the inner width: `_place` writes all of them
        shape = blank.experts.get_parameter(name.removeprefix(prefix + ".")).shape if name in found else None
        if shape is not None and shape != found[name].shape:
            found[name] = torch.empty(shape, dtype=found[name].dtype)
    for f in fresh:
        _place(blank, prefix, found, f, change.experts[f], facts.name)
    if change.matrix_RD is not None:
        if matrix is None:
            raise ValueError(f"{facts.name}: new router rows, and no name of the matrix that they stand in")
        found[matrix][: len(change.row_ids)] = change.matrix_RD.to(found[matrix].dtype)
    return found


def rest(checkpoint: Checkpoint, i: int, change: Change, matrix: str | None) -> dict[str, Tensor]:
    """The tensors of block i that are no matrices of experts: a row per expert becomes a row per kept one."""
    facts, found = checkpoint.facts[i], checkpoint.rest(i)
    experts = set(_names_under(checkpoint, i))
    for name, tensor in found.items():
        before = facts.experts if name in experts else facts.rows
        rows = list(change.keep) if name in experts else change.row_ids
        if _lists_experts(tensor, before) and rows != list(range(before)):
            raise BadInput(
                f"{facts.name}: its router looks experts up in a table ({name}), where none can be taken out or merged"
            )
        if name not in checkpoint.per_expert:
            continue
        axis = row_axis(tensor, checkpoint.grown[name])
        extra = tensor.narrow(axis, before, tensor.shape[axis] - before)  # a router's own extra classes
        new = tensor.index_select(axis, torch.tensor(rows))
        if name not in experts and tensor.numel() == tensor.shape[axis]:  # a number per row
            if change.mix_RE is not None:
                new = (change.mix_RE @ tensor.narrow(axis, 0, facts.experts).float().reshape(-1)).to(tensor).reshape(new.shape)
            if change.shift_R is not None and matrix is not None and name == matrix.removesuffix("weight") + "bias":
                new = (new.float() + change.shift_R.reshape(new.shape)).to(tensor)
        found[name] = torch.cat([new, extra], axis)
    return found


def _names_under(checkpoint: Checkpoint, i: int) -> list[str]:
    prefix = checkpoint.matrices[i][1].rpartition(".")[0] + "."
    return [name for name in checkpoint.of_block[i] if name.startswith(prefix)]


def row_axis(tensor: Tensor, grown: torch.Size) -> int:
    """The axis on which a tensor grows with the number of experts."""
    return next(axis for axis, (a, b) in enumerate(zip(tensor.shape, grown, strict=True)) if a != b)


def _lists_experts(tensor: Tensor, experts: int) -> bool:
    """Whether a tensor holds expert ids."""
    return tensor.dim() == 2 and not tensor.is_floating_point() and tensor.dtype != torch.bool and int(tensor.max()) < experts


def _place(blank: Block, prefix: str, found: dict[str, Tensor], f: int, expert: ExpertWeights, where: str) -> None:
    """Write an expert's canonical tensors where the stacked ones have them."""
    bank = blank.bank
    up = "gate_up_proj" if bank.gated else "up_proj"
    flip = (lambda m: m.T) if bank.transposed else (lambda m: m)
    first = flip(found[f"{prefix}.{up}"][f])
    places = dict(zip(("gate", "up"), bank._halves(first), strict=True)) if bank.gated else {"up": first}
    places["down"] = flip(found[f"{prefix}.down_proj"][f])
    if bank.biased:
        bias = found[f"{prefix}.{up}_bias"][f]
        places |= dict(zip(("gate_bias", "up_bias"), bank._halves(bias), strict=True)) if bank.gated else {"up_bias": bias}
        places["down_bias"] = found[f"{prefix}.down_proj_bias"][f]
    for name, place in places.items():
        if expert[name].shape != place.shape:
            raise ValueError(f"{where}: expert {f}: {name} is {list(expert[name].shape)}, should be {list(place.shape)}")
        place.copy_(expert[name])
