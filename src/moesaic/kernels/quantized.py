"""Experts in 8, 4 or 2 bits on a CPU, each at its own address and in its own width, computed from records as stored.

A record is what low_bits.py describes; where it lies does not matter (a bank, a cache's slot, a mapped file). Three ways:

- few rows per expert: one pass compiled by Numba (compiled/codes.py) reads the codes once and multiplies them as integers
  with activations of 16 bits (one scale per group of inputs: 5e-5 relative error, finer than the bf16 they come from);
- many rows: some experts at a time are widened to bf16 in a scratch that stays in the cache (compiled/code_widen.py), and
  many_rows.py multiplies them; the rounding to bf16 adds 0.2 % to an error of 0.6 % (8 bits) or more;
- else (other forms than SwiGLU, widths the passes cannot take, other machines): one expert at a time is dequantised and
  computed as in reference.py. That is the twin.

Which one runs is decided by the whole dispatch and the expert's own record, never by the experts that happen to be there,
and sums run in the order of spans: `add` in any number of calls gives the same bits.

Shape legend: T tokens, S pairs, D model width, I inner width, H rows of gate and up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import groupby
from operator import lt

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from moesaic.core.errors import BadInput
from moesaic.core.routing import Dispatch
from moesaic.kernels import few_rows, many_rows
from moesaic.kernels.low_bits import Packing, dequantize_matrix, part_offsets, quantize_matrix, record_bytes
from moesaic.kernels.memory import prefer_huge_pages, scratch
from moesaic.kernels.products import Span, hit_spans
from moesaic.kernels.slots import bounds_of
from moesaic.kernels.weights import Form, Weights

FEW_ROWS = 8
"""Pairs per hit expert up to which the integer pass is taken: by count of instructions it does 30 to 45 products a nanosecond
at any number of rows, and the tiles of many_rows.py, which pay for whole groups of 8 rows and for widening, about 110."""

WIDE_BYTES = 16 << 20
"""Experts widened at a time, in bf16: half of a third-level cache."""

Shape = tuple[int, int]


@dataclass(frozen=True, eq=False)
class QuantizedExpert:
    """One expert's records, [H, D] and [D, I] in the orientation of the products, and how they are packed."""

    gate_up: Tensor
    down: Tensor
    gate_up_packing: Packing
    down_packing: Packing
    gate_up_shape: Shape
    down_shape: Shape
    places: tuple[int, int, int, int] = field(init=False, repr=False)
    """The addresses of gate_up's codes and scales, and of down's; the records keep their memory as long as this lives."""

    def __post_init__(self) -> None:
        for name, record, packing, shape in (
            ("gate_up", self.gate_up, self.gate_up_packing, self.gate_up_shape),
            ("down", self.down, self.down_packing, self.down_shape),
        ):
            size = record_bytes(packing, shape)
            if record.dtype != torch.uint8 or record.numel() != size or not record.is_contiguous() or record.is_cuda:
                raise BadInput(
                    f"{name}: the record of a {shape[0]} x {shape[1]} matrix, {packing}, is {size} contiguous bytes (uint8) on "
                    f"the CPU; got {record.dtype} {list(record.shape)} on {record.device}"
                )
        places = (
            *_addresses(self.gate_up, self.gate_up_packing, self.gate_up_shape),
            *_addresses(self.down, self.down_packing, self.down_shape),
        )
        object.__setattr__(self, "places", places)

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """[H, D] and [D, I] in fp32."""
        return (
            dequantize_matrix(self.gate_up, self.gate_up_packing, self.gate_up_shape),
            dequantize_matrix(self.down, self.down_packing, self.down_shape),
        )

    def matrices(self) -> Iterator[tuple[int, int, Packing, Shape]]:
        """The address of the codes and of the scales, the packing and the shape, of gate_up and of down."""
        yield *self.places[:2], self.gate_up_packing, self.gate_up_shape
        yield *self.places[2:], self.down_packing, self.down_shape


def _addresses(record: Tensor, packing: Packing, shape: Shape) -> Shape:
    start = record.data_ptr()
    return start, start + part_offsets(packing, shape)[1]


@dataclass(frozen=True, eq=False)
class QuantizedBank:
    """Experts in few bits, each with its own width; `records` holds them all."""

    experts: tuple[QuantizedExpert, ...]
    records: Tensor

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def nbytes(self) -> int:
        return self.records.nbytes

    @property
    def bits(self) -> tuple[int, ...]:
        """Bits per weight of each expert, scales not counted."""
        return tuple(expert.gate_up_packing.bits for expert in self.experts)

    def dequantize(self, e: int) -> tuple[Tensor, Tensor]:
        """Expert e's [H, D] and [D, I] in fp32."""
        return self.experts[e].dequantize()

    def run(self, x_TD: Tensor, dispatch: Dispatch, form: Form | None = None) -> Tensor:
        """y [T, D] in x's dtype."""
        return run_quantized(x_TD, dispatch, self.experts, form)

    def one_token(self, x_1D: Tensor, ids_1K: Tensor, weights_1K: Tensor, form: Form) -> Tensor | None:
        """`run` for a single token straight from its chosen experts: the same bits, without sorting them into a dispatch.

        None, and nothing done, for what the integer pass does not take, and where an expert is chosen twice.
        """
        from moesaic.kernels.compiled import codes, pool

        plain = x_1D.is_cpu and x_1D.dtype is torch.bfloat16 and not torch.is_grad_enabled()
        if not plain or not self.suits_one_token(form):
            return None
        table_E6, forms_F4, words, stride = self.table
        (inner, width), slots = self.experts[0].gate_up_shape, ids_1K.shape[1]
        inner //= 2
        ids_1K, weights_1K, x_1D = ids_1K.long().contiguous(), weights_1K.float().contiguous(), x_1D.contiguous()
        y_1D = torch.empty_like(x_1D)
        done = codes.one_token(
            x_1D.data_ptr(), ids_1K.data_ptr(), weights_1K.data_ptr(), slots, table_E6, forms_F4,
            scratch("codes_x", 1, words, torch.int16)[0].numpy(),
            scratch("codes_prepared", 1, slots * stride // 2, torch.int16)[0].numpy(),
            stride, inner, width, y_1D.data_ptr(), pool.join(),
        )  # fmt: skip
        return y_1D if done else None

    def suits_one_token(self, form: Form) -> bool:
        """Whether the integer pass takes all of these experts."""
        return all(_suits(_few, expert, form) for expert in self._kinds)

    @property
    def forms(self) -> tuple[Packing, ...]:
        """The packings there are, in the order in which `table` numbers them."""
        forms: dict[Packing, int] = {}
        for expert in self.experts:
            _table_row(expert, forms)
        return tuple(forms)

    @cached_property
    def _kinds(self) -> tuple[QuantizedExpert, ...]:
        """An expert of every width there is."""
        return tuple({(e.gate_up_packing, e.down_packing): e for e in self.experts}.values())

    @cached_property
    def table(self) -> tuple[np.ndarray, np.ndarray, int, int]:
        """A row per expert as the integer pass reads it, the packings that rows name, and the scratch it takes: words of a
        prepared token, bytes of a prepared inner row."""
        from moesaic.kernels.compiled import codes

        forms = {packing: number for number, packing in enumerate(self.forms)}
        table_E6 = np.array([_table_row(expert, forms) for expert in self.experts])
        width, inner = self.experts[0].gate_up_shape[1], self.experts[0].down_shape[1]
        words = sum(codes.row_bytes(width, packing.bits) for packing in forms) // 2
        stride = max(codes.row_bytes(inner, packing.bits) for packing in forms)
        return table_E6, np.array([form_row(packing) for packing in forms]), words, stride


def quantize_bank(
    gate_up: Tensor, down: Tensor, bits: int | Sequence[int] = 4, group_size: int = 64, *, transposed: bool = False
) -> QuantizedBank:
    """Round a bank's weights, expert by expert, into one stretch of memory. `bits` may name a width per expert.

    gate_up [E, H, D] and down [E, D, I], or [E, D, H] and [E, I, D] if transposed. Raises BadInput for other widths or group
    sizes, a list of another length, and weights that quantize_matrix refuses.
    """
    E = gate_up.shape[0]
    widths = [bits] * E if isinstance(bits, int) else list(bits)
    if len(widths) != E or down.shape[0] != E:
        raise BadInput(f"{len(widths)} widths and {down.shape[0]} down matrices for {E} experts: one each")
    gate_up, down = ((w.transpose(1, 2) if transposed else w).detach() for w in (gate_up, down))
    shapes: tuple[Shape, Shape] = (gate_up.shape[1], gate_up.shape[2]), (down.shape[1], down.shape[2])
    packings = [Packing(width, group_size) for width in widths]
    sizes = [record_bytes(packing, shape) for packing in packings for shape in shapes]
    records = prefer_huge_pages(torch.empty(sum(sizes), dtype=torch.uint8))
    places = iter(records.split(sizes))
    experts = []
    for e, packing in enumerate(packings):
        held = [next(places).copy_(quantize_matrix(weight[e], packing)) for weight in (gate_up, down)]
        experts.append(QuantizedExpert(held[0], held[1], packing, packing, *shapes))
    return QuantizedBank(tuple(experts), records)


Experts = Mapping[int, QuantizedExpert] | Sequence[QuantizedExpert]


def run_quantized(x_TD: Tensor, dispatch: Dispatch, experts: Experts, form: Form | None = None) -> Tensor:
    """y [T, D] in x's dtype; no gradients. Only experts that own pairs are looked up."""
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
    add(x_TD, dispatch, experts, hit_spans(bounds_of(dispatch)), y_TD, form)
    return y_TD.to(x_TD.dtype)


def add(
    x_TD: Tensor,
    dispatch: Dispatch,
    experts: Experts,
    spans: list[Span],
    y_TD: Tensor,
    form: Form | None = None,
) -> None:
    """Add these spans' weighted outputs to y (fp32). Spans one after another, in however many calls, give the same bits.

    Raises BadInput for gradients, other devices, and records whose widths do not fit x.
    """
    if x_TD.device.type != "cpu" or (torch.is_grad_enabled() and x_TD.requires_grad):
        raise BadInput("quantised experts compute on the CPU and have no backward: run the model under torch.no_grad()")
    form = form or Form()
    for e, _, _ in spans:
        if experts[e].gate_up_shape[1] != x_TD.shape[1]:
            raise BadInput(f"x is {list(x_TD.shape)} but expert {e} reads inputs of width {experts[e].gate_up_shape[1]}")
    compiled = _few if _is_few(dispatch) else _many
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for way, some in groupby(spans, lambda span: compiled if _suits(compiled, experts[span[0]], form) else _plain):
            way(x_TD, dispatch, experts, list(some), y_TD, form)


Way = Callable[[Tensor, Dispatch, Experts, list[Span], Tensor, Form], None]


def _is_few(dispatch: Dispatch) -> bool:
    """Whether the whole dispatch has so few rows per hit expert that reading weights is what counts."""
    bounds = bounds_of(dispatch)
    hit = sum(map(lt, bounds, bounds[1:]))
    return bounds[-1] <= FEW_ROWS * hit


def available() -> bool:
    """Whether Numba and this CPU's instructions allow the integer pass."""
    return few_rows.host_has("avx512vnni", "avx512bw", "avx512vl", "fma")


def _suits(way: Way, expert: QuantizedExpert, form: Form) -> bool:
    """Whether a compiled pass can take this expert."""
    fused = form.swiglu and form.gate_up_bias_EH is None and form.down_bias_ED is None
    here = available() and (way is not _many or many_rows.available())
    shapes = _suits_many if way is _many else _suits_few
    return fused and here and shapes(expert.gate_up_packing, expert.down_packing, expert.gate_up_shape, expert.down_shape)


@cache
def _suits_many(gate_up_packing: Packing, down_packing: Packing, gate_up: Shape, down: Shape) -> bool:
    """Whether widening and many_rows.py can take experts of these shapes."""
    whole = down[0] % many_rows.MULTIPLE == down[1] % many_rows.MULTIPLE == 0
    return 2 * down[1] == gate_up[0] and whole


@cache
def _suits_few(gate_up_packing: Packing, down_packing: Packing, gate_up: Shape, down: Shape) -> bool:
    """Whether the integer pass can take them."""
    whole = down[0] % (256 // gate_up_packing.bits) == down[1] % (256 // down_packing.bits) == down[0] % 4 == 0
    return 2 * down[1] == gate_up[0] and whole


def _few(x_TD, dispatch, experts, spans, y_TD, form) -> None:
    forms: dict[Packing, int] = {}
    table = np.array([_table_row(experts[e], forms) for e, _, _ in spans])
    first, end = spans[0][1], spans[-1][2]
    spans_P3 = np.array(spans) - np.array([0, first, first])
    token_S, weight_S = dispatch.token_S[first:end].numpy(), dispatch.weight_S[first:end].detach().float().numpy()
    _integer_pass(x_TD, spans_P3, token_S, weight_S, table, list(forms), experts[spans[0][0]].down_shape[1], y_TD)


def _table_row(expert: QuantizedExpert, forms: dict[Packing, int]) -> tuple[int, ...]:
    """Addresses and packings of an expert; `forms` numbers the packings as they come."""
    widths = expert.gate_up_packing, expert.down_packing
    return (*expert.places, *(forms.setdefault(packing, len(forms)) for packing in widths))


def _integer_pass(
    x_TD: Tensor,
    spans_P3: np.ndarray,
    token_S: np.ndarray,
    weight_S: np.ndarray,
    table_P6: np.ndarray,
    forms: Sequence[Packing],
    inner: int,
    y_TD: Tensor,
) -> None:
    from moesaic.kernels.compiled import codes, pool

    cores, pairs = pool.join(), len(token_S)
    x_words = sum(x_TD.shape[0] * codes.row_bytes(x_TD.shape[1], packing.bits) for packing in forms) // 2
    a_stride = max(codes.row_bytes(inner, packing.bits) for packing in forms)
    codes.swiglu(
        x_TD.detach().float().contiguous().numpy(),
        spans_P3,
        token_S,
        weight_S,
        table_P6,
        np.array([form_row(packing) for packing in forms]),
        scratch("codes_x", 1, x_words, torch.int16)[0].numpy(),
        scratch("codes_prepared", 1, pairs * a_stride // 2, torch.int16)[0].numpy(),
        a_stride,
        scratch("codes_a", pairs, inner, torch.float32).numpy(),
        y_TD.numpy(),
        cores,
    )


@cache
def form_row(packing: Packing) -> tuple[int, int, int, int]:
    from moesaic.kernels.compiled.code_dot import KINDS

    unit = 256 // packing.bits
    shift = max(0, (packing.group_size // unit).bit_length() - 1)
    return KINDS.index((packing.bits, max(1, unit // packing.group_size))), packing.bits, packing.group_size, shift


def _many(x_TD, dispatch, experts, spans, y_TD, form) -> None:
    from moesaic.kernels.compiled import pool
    from moesaic.kernels.compiled.code_widen import widen

    (H, D), (_, inner) = experts[spans[0][0]].gate_up_shape, experts[spans[0][0]].down_shape
    at_once = max(1, WIDE_BYTES // (2 * (H * D + D * inner)))
    gate_up = scratch("codes_gate_up", at_once * H, D, torch.bfloat16).view(at_once, H, D)
    down = scratch("codes_down", at_once * D, inner, torch.bfloat16).view(at_once, D, inner)
    for low in range(0, len(spans), at_once):
        here, table = spans[low : low + at_once], []
        for slot, (e, _, _) in enumerate(here):
            for out, (code_at, scale_at, packing, shape) in zip((gate_up, down), experts[e].matrices(), strict=True):
                table.append((code_at, scale_at, out[slot].data_ptr(), *shape, packing.bits, packing.group_size))
        widen(torch.tensor(table).numpy(), pool.join())
        placed = [(slot, start, end) for slot, (_, start, end) in enumerate(here)]
        many_rows.add(x_TD, dispatch, Weights(gate_up, down), placed, y_TD)


def _plain(x_TD, dispatch, experts, spans, y_TD, form) -> None:
    """The twin: one expert at a time as in reference.py, from its dequantised weights in x's dtype."""
    for e, start, end in spans:
        token_s, weight_s = dispatch.token_S[start:end], dispatch.weight_S[start:end].detach().float()
        gate_up, down = (weight.to(x_TD.dtype) for weight in experts[e].dequantize())
        gate_up_bias, down_bias = (
            None if b is None else b[e].to(x_TD.dtype) for b in (form.gate_up_bias_EH, form.down_bias_ED)
        )
        y_sD = linear(form.activate(linear(x_TD[token_s], gate_up, gate_up_bias)), down, down_bias)
        y_sD = (y_sD if form.post is None else form.post(y_sD)).float()
        y_TD.index_add_(0, token_s, y_sD * weight_s.unsqueeze(1))
