"""A bank on a device whose experts lie in slots and arrive some at a time: rows of pairs now, their sum at the end.

`add` computes the pairs of the experts that are here, in any order; a row depends on its expert alone, and `finish` sums a
token's rows in one fixed order. So the result does not depend on what arrived when. Nothing here waits for the device: what
the host knows of the routing (`Plan`) goes over in one copy.

Two ways, chosen as `kernels.choose` does: the Triton programs of the resident path with slot numbers for expert ids, and
plain PyTorch products, their twin.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moesaic.core.routing import Dispatch
from moesaic.kernels import triton
from moesaic.kernels.combine import TokenOrder, sum_per_token
from moesaic.kernels.gpu.tiles import Tiles, block_rows
from moesaic.kernels.in_order import Piece
from moesaic.kernels.products import rows_by_weight
from moesaic.kernels.weights import Weights, compute_dtype


class Plan(NamedTuple):
    """A dispatch on the device as the host laid it out: pairs in token order, and where each token's begin."""

    token_S: Tensor
    weight_S: Tensor
    pair_S: Tensor
    start_T: Tensor

    @classmethod
    def of(cls, dispatch: Dispatch, device: torch.device) -> Plan:
        """`dispatch` lies on the host."""
        token_S = dispatch.token_S.numpy()
        counts_T = np.bincount(token_S, minlength=dispatch.tokens)
        parts = [token_S, np.argsort(token_S, kind="stable"), np.cumsum(counts_T) - counts_T]
        sent = to_device(torch.from_numpy(np.concatenate(parts).astype(np.int64)), device)
        token_S, pair_S, start_T = sent.split([len(part) for part in parts])
        return cls(token_S, to_device(dispatch.weight_S.detach(), device), pair_S, start_T)


def to_device(small: Tensor, device: torch.device) -> Tensor:
    """A few numbers, without waiting for what the device computes."""
    return small.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else small


def rows_on(x_TD: Tensor, plan: Plan, weights: Weights, num_experts: int) -> TorchRows | TritonRows:
    """One call on these slots: by Triton where it can, else by plain products."""
    dtype = compute_dtype(x_TD, weights)
    if x_TD.device.type == "cuda" and triton.missing(weights, dtype) is None:
        return TritonRows(x_TD, plan, weights, num_experts)
    return TorchRows(x_TD, plan, weights)


class TorchRows:
    """Plain products, an expert at a time; any device and dtype, any form of expert."""

    def __init__(self, x_TD: Tensor, plan: Plan, weights: Weights) -> None:
        self.plan, self.weights = plan, weights
        self._x_TD = x_TD.to(compute_dtype(x_TD, weights))
        self._y_SD = self._x_TD.new_zeros(plan.token_S.shape[0], x_TD.shape[1])

    def add(self, pieces: list[Piece]) -> None:
        weights, form = self.weights, self.weights.form
        with torch.no_grad(), torch.autocast(self._x_TD.device.type, enabled=False):
            for e, slot, start, end in pieces:
                span = [(slot, start, end)]
                x_sD = self._x_TD.index_select(0, self.plan.token_S[start:end])
                h_sH = rows_by_weight(x_sD, weights.gate_up_EHD, None, span)
                if form.gate_up_bias_EH is not None:
                    h_sH += form.gate_up_bias_EH[e].to(h_sH.dtype)
                y_sD = rows_by_weight(form.activate(h_sH).contiguous(), weights.down_EDI, None, span)
                if form.down_bias_ED is not None:
                    y_sD += form.down_bias_ED[e].to(y_sD.dtype)
                self._y_SD[start:end] = y_sD if form.post is None else form.post(y_sD)

    def finish(self, dtype: torch.dtype) -> Tensor:
        """y [T, D] of all pairs that were added; others count nothing."""
        return sum_per_token(self._y_SD, self.plan.weight_S, TokenOrder(self.plan.pair_S, self.plan.start_T), dtype)


class TritonRows:
    """The grouped programs of `kernels/triton.py`. Tiles have the size that the whole call has, so that rows of an expert are
    cut as the resident bank cuts them. Rows are stored in token order with their weights, as there."""

    def __init__(self, x_TD: Tensor, plan: Plan, weights: Weights, num_experts: int) -> None:
        dtype = compute_dtype(x_TD, weights)
        pairs = plan.token_S.shape[0]
        self.plan, self.block_m = plan, block_rows(pairs, num_experts)
        self.gate_up_SHD, self.down_SDI = weights.gate_up_EHD.to(dtype), weights.down_EDI.to(dtype)
        self._x_TD = x_TD.to(dtype).contiguous()
        self._y_SD = self._x_TD.new_zeros(pairs, x_TD.shape[1])
        self._place_S = torch.empty_like(plan.pair_S).scatter_(0, plan.pair_S, torch.arange(pairs, device=plan.pair_S.device))

    def add(self, pieces: list[Piece]) -> None:
        slots = self.down_SDI.shape[0]
        pieces = sorted(pieces, key=lambda piece: piece.slot)
        offsets_S1 = np.zeros(slots + 1, np.int64)
        rows: list[np.ndarray] = []
        tiles: list[tuple[int, int]] = []
        at = 0
        for _, slot, start, end in pieces:
            rows.append(np.arange(start, end))
            tiles += [(slot, at + row) for row in range(0, end - start, self.block_m)]
            at += end - start
            offsets_S1[slot + 1] = at
        np.maximum.accumulate(offsets_S1, out=offsets_S1)
        parts = [*rows, offsets_S1, *np.array(tiles, np.int64).reshape(-1, 2).T]
        sent = to_device(torch.from_numpy(np.concatenate(parts)), self._x_TD.device)
        row_s, offsets, slot_N, row_N = sent.split([at, slots + 1, len(tiles), len(tiles)])
        cut = Tiles(slot_N.int(), row_N, self.block_m)
        token_s, weight_s, place_s = (t.index_select(0, row_s) for t in (self.plan.token_S, self.plan.weight_S, self._place_S))
        with torch.no_grad(), torch.autocast(self._x_TD.device.type, enabled=False):
            a_sI = self._x_TD.new_empty(at, self.down_SDI.shape[2])
            triton._hidden(self._x_TD, token_s, offsets, cut, self.gate_up_SHD, a_sI, a_sI, False)
            triton._product(a_sI, None, offsets, cut, self.down_SDI, weight_s, place_s, self._y_SD)

    def finish(self, dtype: torch.dtype) -> Tensor:
        """y [T, D] of all pairs that were added; others count nothing."""
        pairs = self.plan.pair_S.new_full((1,), self._y_SD.shape[0])
        return triton._token_sum(self._y_SD, torch.cat([self.plan.start_T, pairs])).to(dtype)
