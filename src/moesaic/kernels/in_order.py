"""A bank whose experts lie in more than one place, some at a time, on a CPU: the bits of `cpu`, whoever comes when.

`add` gives the pieces that are here with the stack that holds them. Pieces come in the order of experts; which kernel runs
is decided on all spans of the call, so it never depends on where an expert lies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.routing import Dispatch
from moesaic.kernels import few_rows, many_rows
from moesaic.kernels.combine import TokenOrder, sum_per_token
from moesaic.kernels.products import blocks, hit_spans, rows_by_weight
from moesaic.kernels.slots import bounds_of
from moesaic.kernels.weights import Weights, compute_dtype

Matrix = Callable[[int, int], Tensor]
"""(0 gate and up, or 1 down; slot): where that matrix lies."""


ALIGNED = 32
"""Numbers of which a row must hold a multiple to end with a whole vector: two of AVX-512's, in fp32."""


class Piece(NamedTuple):
    """Pairs start : end of a dispatch belong to expert e, whose weights lie in `slot` of a stack."""

    e: int
    slot: int
    start: int
    end: int


class InOrder:
    """One call; no gradients.

    Args:
        like: weights of the bank's shape and form; its biases are those of all experts, `[E, .]`.
        exact: the very bits of `cpu`; without, activations are as cheap as they can be, and equal to rounding.
    """

    def __init__(self, x_TD: Tensor, dispatch: Dispatch, like: Weights, exact: bool = True) -> None:
        if x_TD.device.type != "cpu" or (torch.is_grad_enabled() and x_TD.requires_grad):
            raise BadInput("streamed experts compute on the CPU and have no backward: run the model under torch.no_grad()")
        self.x_TD, self.dispatch, self.form, self.transposed = x_TD, dispatch, like.form, like.transposed
        self.dtype = compute_dtype(x_TD, like)
        self.wide = torch.promote_types(self.dtype, torch.float32)
        # elementwise functions take whole vectors one way and the rest of a tensor another, with other last bits: where rows
        # are no multiple of vectors, an expert's rows must stand where they stand in their block
        self._in_block = exact and not (like.form.swiglu and like.inner_width % ALIGNED == 0)
        spans = hit_spans(bounds_of(dispatch))
        passes = [compiled for compiled in (many_rows, few_rows) if spans and compiled.fits(like, self.dtype, spans)]
        self._compiled = passes[0] if passes else None
        if self._compiled:
            self._y_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
            return
        self._x_TD = x_TD.to(self.dtype)
        self._y_SD = torch.zeros(spans[-1][2] if spans else 0, x_TD.shape[1], dtype=self.wide)
        ends = [spans[-1:]] if dispatch.tokens == 1 else blocks(spans, x_TD.device)
        self._ends = [block[-1][2] for block in ends if block]
        self._first, self._last = 0, 0

    def add(self, pieces: list[Piece], weights: Weights, matrix: Matrix) -> None:
        """Compute the next pieces, which all lie in `weights`; `matrix` says where, to the byte."""
        if self._compiled:
            self._compiled.add(
                self.x_TD, self.dispatch, weights, [(slot, start, end) for _, slot, start, end in pieces], self._y_TD
            )
            return
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for piece in pieces:
                self._rows(piece, matrix)

    def finish(self, dtype: torch.dtype) -> Tensor:
        """y [T, D] of all that was added."""
        if self._compiled:
            return self._y_TD.to(dtype)
        if self.dispatch.tokens == 1:
            return torch.mv(self._y_SD.T, self.dispatch.weight_S.to(self.wide)).to(dtype).unsqueeze(0)
        order = TokenOrder.of(self.dispatch.token_S, self.dispatch.tokens)
        return sum_per_token(self._y_SD, self.dispatch.weight_S, order, dtype)

    def _open(self, start: int) -> None:
        """The block of `cpu.run` that holds pair `start`: the same rows in buffers of the same shape, so that every row lies
        where in a cache line it lies there."""
        self._first = max([0, *(end for end in self._ends if end <= start)])
        self._last = min(end for end in self._ends if end > start)
        size = self._last - self._first
        if self.dispatch.tokens == 1:
            self._x_sD = self._x_TD.repeat(size, 1)
        else:
            self._x_sD = self._x_TD.index_select(0, self.dispatch.token_S[self._first : self._last])
        self._h_sH: Tensor | None = None
        self._a_sI: Tensor | None = None

    def _rows(self, piece: Piece, matrix: Matrix) -> None:
        e, slot, start, end = piece
        if not self._first <= start < self._last:
            self._open(start)
        here, size = slice(start - self._first, end - self._first), self._last - self._first
        h_sH = self._product(self._x_sD[here], matrix(0, slot), self.form.gate_up_bias_EH, e, self._h_sH, size, here)
        self._h_sH = h_sH
        a_sI = self.form.activate(h_sH)[here] if self._in_block else self.form.activate(h_sH[here])
        if self._a_sI is None:
            self._a_sI = a_sI.new_empty(size, a_sI.shape[1])
        self._a_sI[here] = a_sI
        y_sD = self._product(self._a_sI[here], matrix(1, slot), self.form.down_bias_ED, e, None, size, here)
        if self.form.post is not None:
            y_sD = self.form.post(y_sD)
        self._y_SD[start:end] = y_sD[here]

    def _product(
        self, rows_sA: Tensor, stored: Tensor, bias_EB: Tensor | None, e: int, out_sB: Tensor | None, size: int, here: slice
    ) -> Tensor:
        weight_BA = stored.T if self.transposed else stored
        if out_sB is None:
            out_sB = rows_sA.new_zeros(size, weight_BA.shape[0])
        rows_by_weight(rows_sA, weight_BA.unsqueeze(0), None, [(0, 0, rows_sA.shape[0])], out_sB[here])
        if bias_EB is not None:
            out_sB[here] += bias_EB[e].to(out_sB.dtype)
        return out_sB
