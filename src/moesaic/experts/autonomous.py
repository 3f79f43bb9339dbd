"""Autonomy-of-Experts' bank: factorised experts whose first product is also their vote."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from moesaic.core.registry import register
from moesaic.core.routing import Dispatch
from moesaic.experts.bank import ExpertBank


def parity_width(dim: int, width: int, low: int) -> int:
    """dwide at which a factorised expert has as many parameters as a SwiGLU of `width`."""
    return max(1, (3 * dim * width - low * dim) // (low + 2 * dim))


@register("experts", "autonomous", paper="2501.13074", card="routing.md#aoe")
class Autonomous(ExpertBank):
    """y = O_e (silu(Wup_e a) * V_e x) with a = Wdown_e x, the activation that the router ranks by norm.

    `low` is the factor's rank (default dim / 4); the inner width follows from parameter parity with a SwiGLU of
    `width`. `activations` computes every expert's a at once; the winners' rows are reused when the bank runs.
    """

    shows_activations = True
    stacked = ("down_ERD", "up_EIR", "value_EID", "out_EDI")

    def __init__(self, dim: int, experts: int, width: int | None = None, low: int | None = None):
        super().__init__(dim, experts)
        low = max(1, dim // 4) if low is None else low
        wide = parity_width(dim, dim if width is None else width, low)
        self.down_ERD = nn.Parameter(torch.empty(experts, low, dim).normal_(std=dim**-0.5))
        self.up_EIR = nn.Parameter(torch.empty(experts, wide, low).normal_(std=low**-0.5))
        self.value_EID = nn.Parameter(torch.empty(experts, wide, dim).normal_(std=dim**-0.5))
        self.out_EDI = nn.Parameter(torch.empty(experts, dim, wide).normal_(std=wide**-0.5))

    def activations(self, x_TD: Tensor, memo: dict[str, Any]) -> Tensor:
        """a [T, E, R] of every expert, kept in `memo` for `run`."""
        experts, low, _ = self.down_ERD.shape
        memo["activations"] = linear(x_TD, self.down_ERD.flatten(0, 1)).view(-1, experts, low)
        return memo["activations"]

    def run(self, x_TD: Tensor, dispatch: Dispatch, memo: dict[str, Any] | None = None) -> Tensor:
        x_SD = x_TD[dispatch.token_S]
        known = None if memo is None else memo.get("activations")
        if known is None:
            return dispatch.combine(self(x_SD, dispatch.offsets_E1))
        return dispatch.combine(self._finish(known[dispatch.token_S, dispatch.expert_S], x_SD, dispatch.offsets_E1))

    def forward(self, x_SD: Tensor, offsets_E1: Tensor) -> Tensor:
        bounds = offsets_E1.tolist()
        spans = itertools.pairwise(bounds)
        a_SR = torch.cat([linear(x_SD[s:t], self.down_ERD[e]) for e, (s, t) in enumerate(spans)])
        return self._finish(a_SR, x_SD, offsets_E1)

    def _finish(self, a_SR: Tensor, x_SD: Tensor, offsets_E1: Tensor) -> Tensor:
        bounds = offsets_E1.tolist()
        parts = []
        for e, (s, t) in enumerate(itertools.pairwise(bounds)):
            if s < t:
                inner_sI = silu(linear(a_SR[s:t], self.up_EIR[e])) * linear(x_SD[s:t], self.value_EID[e])
                parts.append(linear(inner_sI, self.out_EDI[e]))
        return torch.cat(parts) if parts else x_SD.new_zeros(0, self.dim)
