"""A packed folder (store/packed.py) as a model: transformers loads what it knows, and records become stacked parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.core_model_loading import set_param_for_module

from moesaic.core.errors import BadInput
from moesaic.kernels import QuantizedBank
from moesaic.kernels.low_bits import Packing, dequantize_matrix, record_bytes
from moesaic.kernels.quantized import QuantizedExpert
from moesaic.store import Reader
from moesaic.store.packed import QUANTISED, Block, Packed
from moesaic.store.slots import LINE
from moesaic.view import discover, implementation
from moesaic.view.quantize import Computed


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


def with_experts(model_class: Any, packed: Packed, widened: bool) -> Any:
    """The same, which loads what transformers loads and then the records as stacked parameters.

    Blocks whose experts are all quantised stay records, from which our kernels compute, unless they are to be `widened`.
    """

    def load_weights(model: Any, *arguments: Any) -> Any:
        tensors = stacked(model, packed, widened)
        done = model_class._load_pretrained_model(model, *arguments)
        for name, tensor in tensors.items():
            set_param_for_module(model, name, tensor, done[0], cast(Any, None))
        if not widened:
            _put_records(model, packed)
        return done

    return with_weights(model_class, load_weights)


def stacked(model: Any, packed: Packed, widened: bool) -> dict[str, Tensor]:
    """All experts as the model's stacked parameters in its dtypes; without memory where records stand in for them.

    Raises BadInput, ReadFailed.
    """
    own, made = model.state_dict(), {}
    with Reader("keep") as reader:
        for name, (block, which) in places(model, packed).items():
            if block.as_records and not widened:
                made[name] = torch.empty_like(own[name], device="meta")
            else:
                made[name] = _stack(packed, block, which, own[name].dtype, reader)
    return made


def _put_records(model: Any, packed: Packed) -> None:
    """Read the records of blocks whose experts are all quantised, and have these computed from them."""
    blocks = {block.name: block for block in packed.contents.blocks}
    modules = dict(model.named_modules())
    with Reader("keep") as reader:
        for name in dict.fromkeys(name.rpartition(".")[0] for name in discover.expert_parameters(model)):
            block, count = blocks[name], len(blocks[name].bits_E)
            if not block.as_records:
                continue
            sizes = [size for bits in block.bits_E for size in block.sizes[bits]]
            records = torch.empty(sum(sizes), dtype=torch.uint8)
            pieces = records.split(sizes)
            held = list(zip(pieces[::2], pieces[1::2], strict=True))
            reader.fetch([(packed.matrix(block, e, m), held[e][m]) for e in range(count) for m in (0, 1)]).wait()
            bank = QuantizedBank(tuple(as_expert(packed, block, e, *pair) for e, pair in enumerate(held)), records)
            setattr(modules[name], implementation.STREAMED, Computed(modules[name], bank))


def as_expert(packed: Packed, block: Block, e: int, gate_up: Tensor, down: Tensor) -> QuantizedExpert:
    """A quantised expert, from its records in memory."""
    packing = _packing(packed, block.bits_E[e])
    return QuantizedExpert(gate_up, down, packing, packing, upright(block, 0), upright(block, 1))


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
