"""Weight-only quantised experts on a CPU: int8 with one scale per output row, int4 with scale and zero per group.

Activations stay bf16, which is what PyTorch's kernels for these formats are fast in. At one row int4 reads a layer in
0.4 of the time of packed bf16 and int8 in 0.8; at sixty rows both cost more than bf16, because every weight is widened
again for every few rows. For int8 that is avoided: from LARGE_ROWS on the expert is widened once (int8 is exact in
bf16) and its scale goes to the output. The twin: dequantise, then `reference`.

Packed int4 is an opaque layout that depends on the CPU, so the tensors here are for this machine: save the
dequantised weights, or quantise again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from moesaic.core.errors import BadInput
from moesaic.kernels.products import Span

LARGE_ROWS = 24
"""Rows of one expert from which int8 widens the weight once (measured crossover between 16 and 64)."""

GROUP_SIZES = (32, 64, 128, 256)


@dataclass
class QuantizedMatrix:
    """[E, B, A] weights in `bits`: `packed` [E, ...] as the kernel wants them, `scale` [E, B] (int8) or [E, A/g, B, 2]."""

    bits: int
    group_size: int
    shape: tuple[int, ...]
    packed: Tensor
    scale: Tensor

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes

    def product(self, rows_sA: Tensor, e: int) -> Tensor:
        """rows @ weight[e].T in bf16."""
        if self.bits == 4:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(rows_sA, self.packed[e], self.group_size, self.scale[e])
        if rows_sA.shape[0] < LARGE_ROWS:
            return torch.ops.aten._weight_int8pack_mm(rows_sA, self.packed[e], self.scale[e])
        return linear(rows_sA, self.packed[e].to(rows_sA.dtype)).mul_(self.scale[e])

    def dequantize(self, e: int) -> Tensor:
        """The numbers the products use for expert e, fp32 [B, A]."""
        if self.bits == 8:
            return self.packed[e].float() * self.scale[e].float().unsqueeze(1)
        levels_BA = _unpack_int4(self.packed[e], *self.shape[1:])
        scale_BG, zero_BG = self.scale[e].float().permute(2, 1, 0)
        grouped = (levels_BA.float() - 8).unflatten(1, (-1, self.group_size))
        return (grouped * scale_BG.unsqueeze(2) + zero_BG.unsqueeze(2)).flatten(1)


@dataclass
class QuantizedBank:
    """A bank of experts in int8 or int4: run it with `expert_mlp_stored(x, dispatch, bank)`."""

    bits: int
    group_size: int
    gate_up: QuantizedMatrix
    down: QuantizedMatrix
    dtype: torch.dtype = field(default=torch.bfloat16, init=False)

    @property
    def num_experts(self) -> int:
        return self.gate_up.shape[0]

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    def dequantize(self, e: int) -> tuple[Tensor, Tensor]:
        """Expert e's [H, D] and [D, I] in fp32, exactly as the products see them."""
        return self.gate_up.dequantize(e), self.down.dequantize(e)

    def ready(self, experts: Iterable[int]) -> None:
        pass

    def first(self, x_sD: Tensor, spans: list[Span]) -> Tensor:
        return _products(x_sD, self.gate_up.product, spans)

    def second(self, a_sI: Tensor, spans: list[Span]) -> Tensor:
        return _products(a_sI, self.down.product, spans)


def quantize_bank(
    gate_up: Tensor, down: Tensor, bits: int = 4, group_size: int = 64, *, transposed: bool = False
) -> QuantizedBank:
    """Round a bank's weights to `bits` (8 or 4), expert by expert. `group_size` counts inputs that share a scale (int4).

    Raises BadInput for other bits, for weights that are not on the CPU, and for widths that int4 cannot hold.
    """
    if bits not in (4, 8):
        raise BadInput(f"{bits} bits: this kernel knows 8 and 4")
    if gate_up.device.type != "cpu" or down.device.type != "cpu":
        raise BadInput("quantised products run on the CPU: move the weights there first")
    make = _quantize_int8 if bits == 8 else _quantize_int4
    matrices = [make(w.detach().transpose(1, 2) if transposed else w.detach(), group_size) for w in (gate_up, down)]
    return QuantizedBank(bits, group_size if bits == 4 else 0, *matrices)


def _quantize_int8(weight_EBA: Tensor, _: int) -> QuantizedMatrix:
    packed = torch.empty(weight_EBA.shape, dtype=torch.int8)
    scale = torch.empty(weight_EBA.shape[:2], dtype=torch.bfloat16)
    for e, weight_BA in enumerate(weight_EBA):
        wide_BA = weight_BA.float()
        # The scale is rounded first and the levels chosen for the rounded one: what is stored is what is multiplied.
        scale[e] = (wide_BA.abs().amax(1) / 127).clamp_(min=1e-30)
        packed[e] = (wide_BA / scale[e].float().unsqueeze(1)).round_().clamp_(-127, 127)
    return QuantizedMatrix(8, 0, tuple(weight_EBA.shape), packed, scale)


def _quantize_int4(weight_EBA: Tensor, group_size: int) -> QuantizedMatrix:
    experts, rows, columns = weight_EBA.shape
    if group_size not in GROUP_SIZES or columns % group_size or rows % 16:
        raise BadInput(
            f"int4 holds [B, A] matrices with B a multiple of 16 and A of the group size (one of {GROUP_SIZES}); "
            f"got {rows} x {columns} with groups of {group_size}"
        )
    scale = torch.empty(experts, columns // group_size, rows, 2, dtype=torch.bfloat16)
    packed = []
    for e, weight_BA in enumerate(weight_EBA):
        wide_BGg = weight_BA.float().unflatten(1, (-1, group_size))
        low_BG, high_BG = wide_BGg.amin(2), wide_BGg.amax(2)
        step_BG = ((high_BG - low_BG) / 15).clamp_(min=1e-8).bfloat16()
        zero_BG = (low_BG + 8 * step_BG.float()).bfloat16()
        levels = ((wide_BGg - zero_BG.float().unsqueeze(2)) / step_BG.float().unsqueeze(2)).round_().add_(8).clamp_(0, 15)
        scale[e] = torch.stack([step_BG, zero_BG], 2).transpose(0, 1)
        packed.append(_pack_int4(levels.flatten(1).int()))
    return QuantizedMatrix(4, group_size, (experts, rows, columns), torch.stack(packed), scale)


def _pack_int4(levels_BA: Tensor) -> Tensor:
    # The second argument is the CUDA layout's; the CPU ignores it.
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels_BA.contiguous(), 1)


def _nibbles(packed: Tensor) -> Tensor:
    flat = packed.reshape(-1)
    return torch.stack([flat & 15, flat >> 4], 1).reshape(-1)


@lru_cache(maxsize=8)
def _nibble_places(rows: int, columns: int) -> Tensor:
    """Where the layout puts each level: packed nibble n holds element places[n]. Learnt by packing the digits of every
    element's own index, so it holds for whatever layout this CPU uses."""
    index = torch.arange(rows * columns).reshape(rows, columns)
    places, shift = torch.zeros(rows * columns, dtype=torch.int64), 0
    while (rows * columns - 1) >> shift:
        places |= _nibbles(_pack_int4(((index >> shift) & 15).int())).long() << shift
        shift += 4
    return places


def _unpack_int4(packed: Tensor, rows: int, columns: int) -> Tensor:
    levels = torch.empty(rows * columns, dtype=torch.uint8)
    levels[_nibble_places(rows, columns)] = _nibbles(packed)
    return levels.reshape(rows, columns)


def _products(rows_sA: Tensor, product: Callable[[Tensor, int], Tensor], spans: list[Span]) -> Tensor:
    rows = rows_sA.split([end - start for _, start, end in spans])
    return torch.cat([product(r, e) for (e, _, _), r in zip(spans, rows, strict=True)])
