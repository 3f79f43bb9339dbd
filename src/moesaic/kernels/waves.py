"""The cpu kernel over experts that are not all in memory at once: the same bits, whatever is here and whatever comes.

Weights lie in slots `[S, ., .]`. `parts(spans, matrix)` goes through spans in their order and yields some at a time as
(slot, start, end), whose weights may be read until the next are asked for; `matrix` is 0 (gate and up), 1 (down) or None
(both). Which kernel runs is decided on all spans, never on those that happen to be here, and sums run in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.routing import Dispatch
from moesaic.kernels import cpu, few_rows, many_rows
from moesaic.kernels.products import Span, hit_spans, rows_by_weight
from moesaic.kernels.slots import bounds_of
from moesaic.kernels.weights import Weights, compute_dtype

Parts = Callable[[list[Span], int | None], Iterator[list[Span]]]
Matrix = Callable[[int, int], Tensor]


def run(x_TD: Tensor, dispatch: Dispatch, slots: Weights, parts: Parts, matrix: Matrix | None = None) -> Tensor:
    """y [T, D] in x's dtype, equal to `cpu` on the stacked weights of all experts; no gradients.

    The form's biases are those of all experts, `[E, .]`: they stay in memory. `matrix(which, slot)`: where a slot's matrix
    lies, if it is not row `slot` of the stack. For equal bits it must begin where in a cache line the stacked one does.
    """
    if x_TD.device.type != "cpu" or (torch.is_grad_enabled() and x_TD.requires_grad):
        raise BadInput("streamed experts compute on the CPU and have no backward: run the model under torch.no_grad()")
    dtype = compute_dtype(x_TD, slots)
    spans = hit_spans(bounds_of(dispatch))
    if not spans:
        return torch.zeros_like(x_TD)
    for compiled in (many_rows, few_rows):
        if compiled.fits(slots, dtype, spans):
            y_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
            for part in parts(spans, None):
                compiled.add(x_TD, dispatch, slots, part, y_TD)
            return y_TD.to(x_TD.dtype)
    return cpu.run(x_TD, dispatch, slots.form, _Waves(slots, dtype, parts, matrix), spans)


class _Waves:
    """A store (cpu.Store) whose matrices are read in parts: products of an expert's rows do not depend on its neighbours."""

    def __init__(self, slots: Weights, dtype: torch.dtype, parts: Parts, matrix: Matrix | None) -> None:
        self.slots, self.dtype, self.parts = slots, dtype, parts
        self.matrix = matrix or (lambda which, slot: (slots.gate_up, slots.down)[which][slot])

    def ready(self, experts: Iterable[int]) -> None:
        pass

    def first(self, x_sD: Tensor, spans: list[Span]) -> Tensor:
        return self._product(x_sD, spans, 0)

    def second(self, a_sI: Tensor, spans: list[Span]) -> Tensor:
        return self._product(a_sI, spans, 1)

    def _product(self, rows_sA: Tensor, spans: list[Span], which: int) -> Tensor:
        weight_SBA, base = (self.slots.gate_up_EHD, self.slots.down_EDI)[which], spans[0][1]
        out_sB = rows_sA.new_empty(rows_sA.shape[0], weight_SBA.shape[1])
        for part in self.parts(spans, which):
            for slot, start, end in part:
                here, stored = slice(start - base, end - base), self.matrix(which, slot)
                weight_BA = stored.T if self.slots.transposed else stored
                rows_by_weight(rows_sA[here], weight_BA.unsqueeze(0), None, [(0, 0, end - start)], out_sB[here])
        return out_sB
