"""Monet's bank: N = n * n experts, each the composition of two of 2 n half-experts."""

from __future__ import annotations

from math import isqrt
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.experts.bank import ExpertBank


def half_count(experts: int) -> int:
    """n for N = n * n. Raises BadInput for another count."""
    if experts < 1 or isqrt(experts) ** 2 != experts:
        near = isqrt(max(experts, 1)) ** 2
        raise BadInput(f"experts={experts}: two keyed halves of n each make n * n experts, such as {near}")
    return isqrt(experts)


@register("experts", "monet", paper="2412.04139", card="layers-and-balancing.md#monet", square=True)
class Monet(ExpertBank):
    """Expert i * n + j joins halves i and j; act is relu squared.

    horizontal: E_ij(x) = V_j act(U_i x + b_i) + e_j.
    vertical: a_i = act(U1_i x + b1_i), c_j = act(U2_j x + b2_j), each of width / 2; E_ij(x) = [V11_i a_i + V12_i c_j + e1_i ;
    V21_j a_i + V22_j c_j + e2_j], halves of the output.

    `run_keyed` factorises the double sum over experts: every half is computed once per token, n * (2 width dim) weights
    and no tensor with an axis of N. `forward` runs listed experts one at a time: the definition. Parameters: `in_NMD`
    and `in_bias_NM` stack the first products (both sides' for vertical), `out_NMD` and `out_bias_ND` the second.
    An expert's `bytes_E` is its share of the halves that it shares with n others; halves do not merge by expert.
    """

    keyed = True

    def __init__(self, dim: int, experts: int, width: int | None = None, kind: Literal["horizontal", "vertical"] = "vertical"):
        super().__init__(dim, experts)
        self.n, width = half_count(experts), 16 if width is None else width
        if kind not in ("horizontal", "vertical"):
            raise BadInput(f"kind={kind!r}: horizontal or vertical")
        if kind == "vertical" and (width % 2 or dim % 2):
            raise BadInput(f"width={width}, dim={dim}: the vertical form halves both, so they must be even")
        self.kind, self.width = kind, width
        for name, shape in self._shapes().items():
            start = torch.zeros(shape) if "bias" in name else torch.empty(shape).normal_(std=0.02)
            setattr(self, name, nn.Parameter(start))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        n, m, d = self.n, self.width, self.dim
        if self.kind == "horizontal":
            return {"in_NMD": (n, m, d), "in_bias_NM": (n, m), "out_NMD": (n, m, d), "out_bias_ND": (n, d)}
        first = {"in_bias_NM": (n, m // 2), "in2_bias_NM": (n, m // 2), "in_NMD": (n, m // 2, d), "in2_NMD": (n, m // 2, d)}
        second = {f"out{s}_NMD": (n, m // 2, d // 2) for s in ("11", "12", "21", "22")}
        return {**first, **second, "out1_bias_ND": (n, d // 2), "out2_bias_ND": (n, d // 2)}

    @property
    def cost_E(self) -> Tensor:
        return torch.full((self.num_experts,), 4.0 * self.width * self.dim)

    @property
    def cost_keyed(self) -> float:
        """FLOPs per token of `run_keyed`, without the mixing of heads: all halves run."""
        return 4.0 * self.n * self.width * self.dim

    @property
    def bytes_E(self) -> Tensor:
        total = sum(p.numel() * p.element_size() for p in self.parameters())
        return torch.full((self.num_experts,), total / self.num_experts, dtype=torch.float64)

    def peek(self, e: int) -> dict[str, Tensor]:
        self._check(e)
        i, j = divmod(e % self.num_experts, self.n)
        left = {"in_NMD", "in_bias_NM", "out11_NMD", "out12_NMD", "out1_bias_ND"}
        return {name: getattr(self, name)[i if name in left else j] for name in self._shapes()}

    def expert(self, e: int, x_SD: Tensor) -> Tensor:
        """E_ij of rows x."""
        w = self.peek(e)
        a_SM = relu(linear(x_SD, w["in_NMD"], w["in_bias_NM"])).square()
        if self.kind == "horizontal":
            return a_SM @ w["out_NMD"] + w["out_bias_ND"]
        c_SM = relu(linear(x_SD, w["in2_NMD"], w["in2_bias_NM"])).square()
        first = a_SM @ w["out11_NMD"] + c_SM @ w["out12_NMD"] + w["out1_bias_ND"]
        return torch.cat([first, a_SM @ w["out21_NMD"] + c_SM @ w["out22_NMD"] + w["out2_bias_ND"]], -1)

    def forward(self, x_SD: Tensor, offsets_E1: Tensor) -> Tensor:
        busy = offsets_E1.diff().nonzero().squeeze(1)
        spans = zip(busy.tolist(), offsets_E1[busy].tolist(), offsets_E1[busy + 1].tolist(), strict=True)
        parts = [self.expert(e, x_SD[s:t]) for e, s, t in spans]
        return torch.cat(parts) if parts else x_SD.new_zeros(0, self.dim)

    def run_keyed(self, x_TD: Tensor, gates_T2HN: Tensor) -> Tensor:
        """sum_h sum_ij g1_hi g2_hj E_ij(x), also for gates that do not sum to 1 (masked ones)."""
        g1_THN, g2_THN = gates_T2HN.to(x_TD.dtype).unbind(1)
        a_TNM = self._inner(x_TD, "in_NMD", "in_bias_NM")
        a_THM = g1_THN @ a_TNM
        s1_TH1, s2_TH1 = g1_THN.sum(-1, keepdim=True), g2_THN.sum(-1, keepdim=True)
        pair1_TN, pair2_TN = (g1_THN * s2_TH1).sum(1), (g2_THN * s1_TH1).sum(1)
        if self.kind == "horizontal":
            return self._outer(g2_THN.mT @ a_THM, "out_NMD") + pair2_TN @ self._bias("out_bias_ND")
        c_TNM = self._inner(x_TD, "in2_NMD", "in2_bias_NM")
        first = self._outer(pair1_TN.unsqueeze(-1) * a_TNM, "out11_NMD")
        first = first + self._outer(g1_THN.mT @ (g2_THN @ c_TNM), "out12_NMD") + pair1_TN @ self._bias("out1_bias_ND")
        second = self._outer(g2_THN.mT @ a_THM, "out21_NMD")
        second = second + self._outer(pair2_TN.unsqueeze(-1) * c_TNM, "out22_NMD") + pair2_TN @ self._bias("out2_bias_ND")
        return torch.cat([first, second], -1)

    def without(self, x_TD: Tensor, gates_T2HN: Tensor, experts: list[int]) -> Tensor:
        """`run_keyed` less the listed experts, exactly. (Zeroing a key in the gates removes a whole half instead.)"""
        y_TD = self.run_keyed(x_TD, gates_T2HN)
        for e in experts:
            i, j = divmod(e, self.n)
            weight_T = (gates_T2HN[:, 0, :, i] * gates_T2HN[:, 1, :, j]).sum(1)
            y_TD = y_TD - weight_T.to(x_TD.dtype).unsqueeze(1) * self.expert(e, x_TD)
        return y_TD

    def _bias(self, name: str) -> Tensor:
        return getattr(self, name)

    def _inner(self, x_TD: Tensor, weight: str, bias: str) -> Tensor:
        w_NMD = getattr(self, weight)
        h_TM = linear(x_TD, w_NMD.flatten(0, 1), getattr(self, bias).flatten())
        return relu(h_TM).square().view(-1, *w_NMD.shape[:2])

    def _outer(self, mixed_TNM: Tensor, weight: str) -> Tensor:
        return mixed_TNM.flatten(1) @ getattr(self, weight).flatten(0, 1)
