"""Methods that hold experts as factors: how the bytes are counted, and how factors become a Change.

Both stacked products are taken upright and in the model's own order of rows, as `first` [H, D] (gate and up together) and
`down` [D, I], so that no layout is special. Shape legend: E experts, B outputs, A inputs, r rank, N whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.models.reshaped.factored import SIDES, spread
from moesaic.surgery.layer import Change, Facts, Layer, Method
from moesaic.view.bank import ExpertWeights

STORES = ("factors", "dense")


@dataclass
class Split:
    """One product of all experts as factors: W_e = base + left_e^T right_e, and rows added at `index`.

    left [r, B] and right [r, A] of each expert; `rows`: (outputs [N], rows [N, A]) of each, or none.

    Attributes:
        shared: "left" or "right" where that factor is one for all: its list holds it alone, and expert e reads its first r.
        outputs, inputs: those that the base has, where these are not all; `active`: how many of its inputs a token reads.
    """

    left: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    base: Tensor | None = None
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    shared: str | None = None
    outputs: Tensor | None = None
    inputs: Tensor | None = None
    active: int | None = None

    def add(self, factors: tuple[Tensor, Tensor]) -> None:
        self.left.append(factors[0])
        self.right.append(factors[1])

    @property
    def ranks(self) -> list[int]:
        return [len(own) for own in (self.right if self.shared == "left" else self.left)]

    def dense(self, e: int) -> Tensor:
        rank = self.ranks[e]
        left, right = self.left[0 if self.shared == "left" else e], self.right[0 if self.shared == "right" else e]
        made_BA = left[:rank].T @ right[:rank]
        made_BA = made_BA if self.base is None else made_BA + self.base_like(made_BA)
        return made_BA.index_add(0, *self.rows[e]) if self.rows else made_BA

    def base_like(self, like_BA: Tensor) -> Tensor:
        """The base with all outputs and inputs."""
        return torch.zeros_like(like_BA) if self.base is None else spread(self.base, like_BA, self.outputs, self.inputs)

    @property
    def numel(self) -> int:
        """Numbers stored; an index counts as two of two bytes, a shared factor once."""
        total = sum(part.numel() for part in (*self.left, *self.right)) + (0 if self.base is None else self.base.numel())
        total += sum(2 * len(index) for index in (self.outputs, self.inputs) if index is not None)
        return total + sum(values.numel() + 2 * len(values) for _, values in self.rows)

    def spec(self) -> dict[str, Any]:
        """What `models/reshaped/factored.py` must know of its shapes."""
        found: dict[str, Any] = {"ranks": self.ranks, "base": self.base is not None}
        found |= {name: len(index) for name, index in self._indices().items()}
        found |= {name: own for name in ("shared", "active") if (own := getattr(self, name)) is not None}
        return found | ({"rows": [len(values) for _, values in self.rows]} if self.rows else {})

    def tensors(self, side: str) -> dict[str, Tensor]:
        found = {"left": torch.cat(self.left), "right": torch.cat(self.right)}
        if self.base is not None:
            found["base"] = self.base
        found |= {name: index.int() for name, index in self._indices().items()}
        if self.rows:
            found["rows"] = torch.cat([values for _, values in self.rows])
            found["index"] = torch.cat([index for index, _ in self.rows]).int()
        return {f"{side}.{name}": tensor for name, tensor in found.items()}

    def _indices(self) -> dict[str, Tensor]:
        return {name: own for name in ("outputs", "inputs") if (own := getattr(self, name)) is not None}


class Factored(Method):
    """Base. `keep`: share of the bytes of experts that stay; `store`: factors, or multiplied out (stock, and no smaller).

    A subclass says by `split` what stands for one product of a layer's experts. Keeping all leaves every byte.
    """

    def __init__(self, keep: float = 0.5, store: str = "factors") -> None:
        if not 0 < keep <= 1:
            raise BadInput(f"keep {keep}: the share of the experts' bytes that stays, above 0 and at most 1")
        if store not in STORES:
            raise BadInput(f"store {store!r}: one of {', '.join(STORES)}")
        self.keep, self.store = float(keep), store
        self.stock = store == "dense" or keep == 1
        self.factors = not self.stock

    def bytes(self, facts: Facts, count: int) -> int:
        whole = super().bytes(facts, count)
        return whole if self.store == "dense" else round(whole * self.keep)

    def decide(self, looks: Sequence[Any], blocks: Sequence[Facts]) -> list[Any]:
        return list(looks)

    def split(self, layer: Layer, side: str, decision: Any) -> Split:
        raise NotImplementedError

    def change(self, layer: Layer, decision: Any) -> Change:
        E = layer.facts.experts
        change = Change(range(E))
        if self.keep == 1:
            return change
        parts = {side: self.split(layer, side, decision) for side in SIDES}
        whole = sum(upright(layer, 0, side).numel() for side in SIDES) * E
        change.report = {
            "share": sum(part.numel for part in parts.values()) / whole,
            **{f"{side}_ranks": part.spec()["ranks"] for side, part in parts.items()},
            **{f"{side}_error": _errors(layer, side, part) for side, part in parts.items()},
        }
        if self.store == "factors":
            change.form = {side: part.spec() for side, part in parts.items()}
            for side, part in parts.items():
                change.bank |= part.tensors(side)
            return change
        for e in range(E):
            change.experts[e] = expert_of(layer, e, parts["first"].dense(e), parts["down"].dense(e))
        return change


def _errors(layer: Layer, side: str, part: Split) -> list[float]:
    """Relative error of every expert's matrix."""
    found = []
    for e in range(layer.facts.experts):
        own_BA = upright(layer, e, side)
        found.append(float((part.dense(e) - own_BA).norm() / own_BA.norm().clamp(min=1e-30)))
    return found


def upright(layer: Layer, e: int, side: str) -> Tensor:
    """Expert e's first or second matrix, float32 [B, A]."""
    bank, experts = layer.block.bank, layer.block.experts
    name = "down_proj" if side == "down" else "gate_up_proj" if bank.gated else "up_proj"
    matrix = getattr(experts, name)[e].detach().float()
    return matrix.T.contiguous() if bank.transposed else matrix


def stacked(layer: Layer, e: int, side: str, kind: str) -> Tensor:
    """The same rows of a statistic that is stacked as the parameters are, such as `fisher`."""
    bank = layer.block.bank
    name = "down_proj" if side == "down" else "gate_up_proj" if bank.gated else "up_proj"
    matrix = layer.statistics[f"{kind}.{name}_sum"][e].float()
    return matrix.T.contiguous() if bank.transposed else matrix


def expert_of(layer: Layer, e: int, first_HD: Tensor, down_DI: Tensor) -> ExpertWeights:
    """The expert of these two matrices, with its own biases."""
    found = dict(layer.expert(e))
    if layer.block.bank.gated:
        found["gate"], found["up"] = layer.block.bank._halves(first_HD)
    else:
        found["up"] = first_HD
    found["down"] = down_DI
    return ExpertWeights(found)


def low_rank(weight_BA: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of this rank: left [r, B] and right [r, A], the root of the singular values on each side."""
    u_BK, s_K, v_KA = torch.linalg.svd(weight_BA, full_matrices=False)
    root_K = s_K[:rank].sqrt()
    return (u_BK[:, :rank] * root_K).T.contiguous(), root_K[:, None] * v_KA[:rank]


def whitened(weight_BA: Tensor, moment_AA: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of this rank of least ||(W - L R) X||, where X X^T is `moment` (positive definite, float64)."""
    root_AA = torch.linalg.cholesky(moment_AA)
    u_BK, s_K, v_KA = torch.linalg.svd(weight_BA.double() @ root_AA, full_matrices=False)
    size_K = s_K[:rank].sqrt()
    right_KA = torch.linalg.solve_triangular(root_AA, v_KA[:rank] * size_K[:, None], upper=False, left=False)
    return (u_BK[:, :rank] * size_K).T.float().contiguous(), right_KA.float()


def neurons_at(layer: Layer, neurons_N: Tensor) -> Tensor:
    """Rows of the first product [H, D] that make these inner neurons: theirs of gate and up, as the model orders them."""
    rows_H = torch.arange(upright(layer, 0, "first").shape[0])
    if not layer.block.bank.gated:
        return rows_H[neurons_N]
    return torch.cat([half[neurons_N] for half in layer.block.bank._halves(rows_H)]).sort().values


def moment_of(layer: Layer, e: int | None, side: str, damp: float = 1e-6) -> Tensor:
    """Mean x x^T of what enters an expert's product, [A, A] float64; that of all experts for one with fewer tokens than A,
    and for None.

    `damp` times the mean diagonal is added to the diagonal, and ten times more until it has a Cholesky factor: many tokens may
    be few different ones, and sums are rounded to float32.
    """
    name = "input_gram" if side == "first" else "inner_gram"
    sums_EAA, count_E = layer.statistics[f"{name}_sum"], layer.statistics["selection_count"]
    if e is None or float(count_E[e]) < sums_EAA.shape[-1]:
        gram_AA, count = sums_EAA.double().sum(0), float(count_E.sum())
    else:
        gram_AA, count = sums_EAA[e].double(), float(count_E[e])
    gram_AA = gram_AA / max(count, 1.0)
    size = float(gram_AA.diagonal().mean())
    one_AA = torch.eye(len(gram_AA), dtype=torch.float64)
    if not size > 0:
        return gram_AA + one_AA
    made_AA = gram_AA + damp * size * one_AA
    while damp < 1 and bool(torch.linalg.cholesky_ex(made_AA).info):
        damp *= 10
        made_AA = gram_AA + damp * size * one_AA
    return made_AA
