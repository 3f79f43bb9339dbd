"""Put a Change into a live block, in place: the in-memory twin of writing it into a checkpoint.

E experts before, F experts and R router rows afterwards, D model width, I inner width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.core.errors import BadInput
from moesaic.models.reshaped.factored import fill, install
from moesaic.surgery.layer import Change, Facts
from moesaic.view.bank import ViewBank
from moesaic.view.block import Block
from moesaic.view.shared_rows import share


@torch.no_grad()
def apply(block: Block, change: Change, facts: Facts) -> None:
    """Change the block's experts and router in place; the model's configuration stays as it was. A block without memory
    gets the shapes, and new experts are left out.

    Raises BadInput for a router that looks experts up in a table, when rows of it go, and ValueError for a wrong Change.
    """
    change.check(facts)
    held_R = block.row_map
    change = change.through(None if held_R is None else held_R.tolist())
    if change.row_ids != list(range(facts.rows)) or change.matrix_RD is not None:
        refuse_tables(block, facts)
    if change.form:
        fill(install(block.experts, change.form), change.bank)
    else:
        _bank(block, change)
    _router(block, change, facts)
    held, rows = len(change.keep), len(change.row_ids)
    for owner in (block.router, block.parent):
        _count(owner, facts.rows, rows)
    _count(block.experts, facts.experts, held)
    mapped = None if change.row_to_expert is None else list(change.row_to_expert)
    share(block.experts, None if mapped == list(range(held)) else mapped)


def refuse_tables(block: Block, facts: Facts) -> None:
    """Raises BadInput for a hash router: its experts are looked up by token id, and no row says where a token goes next."""
    for name, tensor in per_expert(block):
        if not tensor.is_floating_point() and tensor.dim() == 2:
            raise BadInput(
                f"{facts.name}: its router looks experts up in a table ({name}), so rows cannot go or be mixed; "
                "merge with router map or repeat instead"
            )


def per_expert(block: Block) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the router, and the block's own, by name: what may have a value per expert."""
    owners: list[tuple[Any, bool]] = [] if block.router is None else [(block.router, True)]
    for owner, deep in [*owners, (block.parent, False)]:
        yield from owner.named_parameters(recurse=deep)
        yield from owner.named_buffers(recurse=deep)


def row_axis(name: str, tensor: Tensor, facts: Facts, rows: int) -> int | None:
    """The axis of a router's tensor that has a value per router row; None where none has.

    A vector as long as the model is wide could be a norm's: it counts only when its name speaks of a bias or of experts.
    """
    if not tensor.is_floating_point():
        return None
    vector = tensor.dim() == 1 or (tensor.dim() == 2 and tensor.shape[0] == 1)
    if vector and tensor.shape[-1] == facts.width and not any(word in name for word in ("bias", "expert")):
        return None
    if vector:
        return tensor.dim() - 1 if tensor.shape[-1] in (facts.rows, rows) else None
    return 0 if tensor.dim() == 2 and tensor.shape[0] in (facts.rows, rows) else None


def router_rows(block: Block, facts: Facts) -> int:
    """Rows of the router: the experts, and classes of its own behind them ("skip", or shared experts)."""
    for name in ("num_router_classes", "n_total_experts"):
        rows = getattr(block.router, name, None)
        if isinstance(rows, int) and rows > facts.rows:
            return rows
    return facts.rows


def _router(block: Block, change: Change, facts: Facts) -> None:
    E, rows, total = facts.rows, change.row_ids, router_rows(block, facts)
    if rows == list(range(E)) and change.matrix_RD is None and change.mix_RE is None and change.shift_R is None:
        return
    bias = matrix = ""
    for name, tensor in list(per_expert(block)):
        axis = row_axis(name, tensor, facts, total)
        if axis is None:
            continue
        is_matrix = tensor.dim() == 2 and axis == 0
        if is_matrix:
            if change.matrix_RD is not None and matrix:
                raise BadInput(f"{facts.name}: its router has two matrices with a row per expert, {matrix} and {name}")
            matrix, bias = name, name.removesuffix("weight") + "bias"
        given = change.matrix_RD if is_matrix else None
        if given is None and change.mix_RE is not None and not is_matrix:
            given = change.mix_RE.to(tensor.device, torch.float32) @ tensor.narrow(axis, 0, E).float().reshape(E)
        if name == bias and change.shift_R is not None:
            given = (tensor[rows].float() if given is None else given) + change.shift_R.to(tensor.device)
        own = torch.arange(E, tensor.shape[axis], device=tensor.device)
        if given is None:
            kept = torch.tensor(rows, device=tensor.device)
            new = tensor.index_select(axis, torch.cat([kept, own]))
        else:
            new = given.to(tensor)
            new = torch.cat([new if is_matrix else new.reshape(*tensor.shape[:axis], -1), tensor.index_select(axis, own)], axis)
        _replace(block, name, tensor, new)


def _replace(block: Block, name: str, old: Tensor, new: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owners = [block.parent] if block.router is None else [block.router, block.parent]
    for owner in owners:
        try:
            module = owner.get_submodule(path)
        except AttributeError:
            continue
        if getattr(module, leaf, None) is old:
            _put(module, leaf, old, new)
            return
    raise ValueError(f"{block.name}: no tensor {name}")


def _put(module: nn.Module, name: str, old: Tensor, new: Tensor) -> None:
    """Replaces what stands there; a parameter stays a parameter."""
    setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _bank(block: Block, change: Change) -> None:
    bank, experts = block.bank, block.experts
    E, keep = len(bank), list(change.keep)
    if keep == list(range(E)) and not change.experts:
        return
    new, own = change.experts, bank.peek(0)
    for i, weights in new.items():
        if set(weights) != set(own):
            raise ValueError(f"{block.name}: new expert {i} has {', '.join(weights)}; experts here have {', '.join(own)}")
    before = own["up"].shape[0]
    inner = {weights["up"].shape[0] for weights in new.values()} | ({before} if len(new) < len(keep) else set())
    if len(inner) > 1:
        raise ValueError(f"{block.name}: experts of inner widths {sorted(inner)} side by side")
    after = inner.pop()
    for name, old in list(experts.named_parameters(recurse=False)) + list(experts.named_buffers(recurse=False)):
        if old.dim() and old.shape[0] == E:
            stack = old[torch.tensor(keep, device=old.device)]
            _put(experts, name, old, stack if before == after else _sized(bank, name, stack, after))
    for name in ("intermediate_dim", "intermediate_size"):
        if getattr(experts, name, None) == before:
            setattr(experts, name, after)
    for i, weights in new.items() if not experts.down_proj.is_meta else ():
        bank[i] = weights


def _sized(bank: ViewBank, name: str, stack: Tensor, inner: int) -> Tensor:
    """An empty stack like this one for experts of another inner width; one without an inner axis as it is."""
    shape = list(stack.shape)
    if name.startswith(("gate_up_proj", "up_proj")):
        shape[2 if bank.transposed and stack.dim() == 3 else 1] = inner * (2 if bank.gated else 1)
    elif name == "down_proj":
        shape[1 if bank.transposed else 2] = inner
    return stack if shape == list(stack.shape) else stack.new_zeros(shape)


def _count(owner: Any, old: int, new: int) -> None:
    """Integers of a module that say how many experts there are; classes behind the experts stay as many."""
    if owner is None or old == new:
        return
    for name, value in list(vars(owner).items()):
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if name in ("num_experts", "num_local_experts", "n_routed_experts", "out_features") and value == old:
            setattr(owner, name, new)
        elif name in ("num_router_classes", "n_total_experts") and value > old:
            setattr(owner, name, value - old + new)
