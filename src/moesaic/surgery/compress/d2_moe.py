"""D²-MoE: one shared base per layer, and for each expert a low-rank difference that is fitted where its inputs lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.factored import Factored, Split, low_rank, moment_of, stacked, upright, whitened
from moesaic.surgery.layer import Facts, Layer

BASES = ("fisher", "frequency", "mean")


@register("compress", "d2_moe", paper="2502.17298", card="surgery-and-steering.md#d2-moe", exact=False, needs={"R0", "R2"})
class D2Moe(Factored):
    """W_e = base + L_e R_e, with the factors of least error on the expert's own inputs (SVD of the difference times the
    Cholesky factor of their second moment, 1e-6 of its mean diagonal added; all experts' inputs for one with fewer tokens
    than inputs). The first product has the moment of x, the second that of h.

    Not built of the published code: sharing one factor among experts, and pruning the base.

    Args:
        keep: share of the experts' bytes that stays; the base takes 1 / E of them, the rest is rank, equal for all.
        store: "factors" (smaller, needs `import moesaic`) or "dense" (multiplied out: stock, and no smaller).
        base: "fisher" (elementwise Fisher information times frequency, as published; reads tier B, for which the model is
            loaded whole), "frequency" or "mean".
        whiten: false for the plain SVD of the difference.
    """

    def __init__(self, keep: float = 0.5, store: str = "factors", base: str = "fisher", whiten: bool = True) -> None:
        super().__init__(keep, store)
        if base not in BASES:
            raise BadInput(f"base {base!r}: one of {', '.join(BASES)}")
        self.base, self.whiten = base, whiten
        if base == "fisher" and keep < 1:
            self.needs = frozenset({"B"})

    def plan(self, blocks: Sequence[Facts]) -> list[int]:
        for facts in blocks:
            if self.keep * facts.fewest < 1:
                raise BadInput(
                    f"keep {self.keep}: the base alone takes 1/{facts.fewest} of {facts.name}: "
                    f"keep {1 / facts.fewest:.3f} or more"
                )
        return super().plan(blocks)

    def split(self, layer: Layer, side: str, decision: Any) -> Split:
        E = layer.facts.experts
        base_BA = self.mean(layer, side)
        B, A = base_BA.shape
        rank = min(int((self.keep * E - 1) * B * A / (E * (B + A)) + 1e-9), B, A)
        found = Split(base=base_BA)
        for e in range(E):
            delta_BA = upright(layer, e, side) - base_BA
            if not rank or not bool(delta_BA.any()):
                found.add((base_BA.new_zeros(rank, B), base_BA.new_zeros(rank, A)))
            elif self.whiten:
                found.add(whitened(delta_BA, moment_of(layer, e, side), rank))
            else:
                found.add(low_rank(delta_BA, rank))
        return found

    def mean(self, layer: Layer, side: str) -> Tensor:
        """The base [B, A]: a weighted mean, plain where no expert has any weight."""
        E, frequency_E = layer.facts.experts, layer.statistics["selection_count"].float()
        total_BA, weight_BA, plain_BA = (torch.zeros_like(upright(layer, 0, side)) for _ in range(3))
        for e in range(E):
            own_BA = upright(layer, e, side)
            plain_BA += own_BA / E
            if self.base == "mean":
                continue
            share = frequency_E[e] / frequency_E.sum().clamp(min=1)
            mine_BA = torch.full_like(own_BA, float(share))
            if self.base == "fisher":
                mine_BA = mine_BA * stacked(layer, e, side, "fisher")
            total_BA += mine_BA * own_BA
            weight_BA += mine_BA
        if self.base == "mean":
            return plain_BA
        return torch.where(weight_BA > 0, total_BA / weight_BA.clamp(min=torch.finfo(torch.float32).tiny), plain_BA)
