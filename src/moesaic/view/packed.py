"""A packed folder (store/packed.py) as a model: transformers loads what it knows, and records become stacked parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.core_model_loading import set_param_for_module

from moesaic.core.errors import BadInput
from moesaic.kernels.low_bits import Packing, dequantize_matrix, record_bytes
from moesaic.store import Reader
from moesaic.store.packed import QUANTISED, Block, Packed
from moesaic.store.slots import LINE
from moesaic.view import discover


def places(model: Any, packed: Packed) -> dict[str, tuple[Block, int]]:
    """Name of each stacked matrix of the model -> its packed block, and 0 or 1. Raises BadInput where they do not fit."""
    blocks = {block.name: block for block in packed.contents.blocks}
    own, found = model.state_dict(), {}
    for name, (_, which) in discover.expert_parameters(model).items():
        block = blocks.get(name.rpartition(".")[0])
        if block is None:
            raise BadInput(f"{packed.folder} was packed from {packed.contents.model} and has no experts for {name}")
        shape = (len(block.bits_E), *block.shapes[which])
        if tuple(own[name].shape) != shape:
            raise BadInput(f"{packed.folder}: experts for {name} are {list(shape)}, the model wants {list(own[name].shape)}")
        for bits in set(block.bits_E).intersection(QUANTISED):
            given, size = block.sizes[bits][which], record_bytes(_packing(packed, bits), upright(block, which))
            if given != size:
                raise BadInput(f"{packed.folder}: {name} in {bits} bits has records of {given} bytes, and should have {size}")
        found[name] = block, which
    return found


def shift_of(block: Block, which: int, e: int, dtype: torch.dtype) -> int:
    """Where in a cache line the model that was packed has a matrix of expert e, loaded in that dtype."""
    size = math.prod(block.shapes[which]) * dtype.itemsize
    return ((block.shifts[which] if dtype == block.dtype else 0) + e * size) % LINE


def with_weights(model_class: Any, load_weights: Callable) -> Any:
    """A subclass for one `from_pretrained`, whose weights come from `load_weights`: nothing global is patched."""
    return type(
        model_class.__name__,
        (model_class,),
        {"__module__": model_class.__module__, "_load_pretrained_model": staticmethod(load_weights)},
    )


def with_experts(model_class: Any, packed: Packed) -> Any:
    """The same, which loads what transformers loads and then the records as stacked parameters."""

    def load_weights(model: Any, *arguments: Any) -> Any:
        tensors = stacked(model, packed)
        done = model_class._load_pretrained_model(model, *arguments)
        for name, tensor in tensors.items():
            set_param_for_module(model, name, tensor, done[0], cast(Any, None))
        return done

    return with_weights(model_class, load_weights)


def stacked(model: Any, packed: Packed) -> dict[str, Tensor]:
    """All experts in memory, as the model's stacked parameters in its dtypes. Raises BadInput, ReadFailed."""
    own, made = model.state_dict(), {}
    with Reader("keep") as reader:
        for name, (block, which) in places(model, packed).items():
            made[name] = _stack(packed, block, which, own[name].dtype, reader)
    return made


def _stack(packed: Packed, block: Block, which: int, dtype: torch.dtype, reader: Reader) -> Tensor:
    experts, shape = len(block.bits_E), block.shapes[which]
    count = experts * math.prod(shape)
    room = torch.empty(count + 2 * LINE // dtype.itemsize, dtype=dtype)
    first = (shift_of(block, which, 0, dtype) - room.data_ptr()) % LINE // dtype.itemsize
    stack = room[first : first + count].view(experts, *shape)
    ranges = [packed.matrix(block, e, which) for e in range(experts)]
    reader.fetch([(stored, stack[e]) for e, stored in enumerate(ranges) if stored.dtype == dtype]).wait()
    for e, stored in enumerate(ranges):
        if stored.dtype != dtype:
            stack[e] = unpacked(reader.read(stored), packed, block, e, which)
    return stack


def unpacked(read: Tensor, packed: Packed, block: Block, e: int, which: int) -> Tensor:
    """A matrix read from its record, in the model's layout; a quantised one in fp32."""
    bits = block.bits_E[e]
    if bits not in QUANTISED:
        return read
    wide_BA = dequantize_matrix(read, _packing(packed, bits), upright(block, which))
    return wide_BA.T if block.transposed else wide_BA


def upright(block: Block, which: int) -> tuple[int, int]:
    """[outputs, inputs] of a matrix: how quantised records hold it."""
    first, second = block.shapes[which]
    return (second, first) if block.transposed else (first, second)


def _packing(packed: Packed, bits: int) -> Packing:
    return Packing(bits, packed.contents.group_size)
