"""Maestro after training: factors whose ranks are put in order by sampled truncation and a hierarchical lasso, then cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.experts.maestro import Factors, RankSampler
from moesaic.surgery.factored import Factored, Split, moment_of, upright
from moesaic.surgery.layer import Layer

EPS = 1e-4
"""Of Adam. From the SVD on, the full product's gradient is rounding noise, which a smaller one would blow up to whole steps."""

ROUNDS = 4
"""How often empty ranks are cut while training."""


@register(
    "compress", "maestro", paper="2308.14929", card="surgery-and-steering.md#maestro",
    exact=False, needs={"R0", "R2"},
)  # fmt: skip
class MaestroRanks(Factored):
    """Every matrix starts from its SVD and trains on what it computes for inputs of the second moment that it saw (R2):
    error of the full product, plus the change when one matrix uses its first b ranks only, plus the lasso on suffix norms.
    A step draws one (matrix, b) from all pairs of a layer's product; the other matrices are full, so what they lose in a step
    is their full product's error. Ranks that become empty are cut; then the layer's ranks are given to where suffix norms are
    largest, until the budget is spent. No rank above what is smaller than the matrix itself.

    Published, the whole model trains on its own loss. This is the layer-wise form, which one layer's memory is enough for.

    Args:
        keep: share of the experts' bytes that stays.
        store: "factors" (smaller, needs `import moesaic`) or "dense" (multiplied out: stock, and no smaller).
        steps: per matrix on average; 0 is the SVD on the inputs, with ranks shared out.
        lam: of the lasso, which is divided by the number of parameters.
        lr: of Adam. No weight decay: it works against the lasso.
        seed: of the draws.
    """

    def __init__(
        self, keep: float = 0.5, store: str = "factors", steps: int = 40, lam: float = 5e-3, lr: float = 1e-3, seed: int = 0
    ) -> None:
        super().__init__(keep, store)
        if steps < 0 or lam < 0 or lr <= 0:
            raise BadInput(f"steps {steps}, lam {lam}: not below 0; lr {lr}: above 0")
        self.steps, self.lam, self.lr, self.seed = steps, lam, lr, seed

    def split(self, layer: Layer, side: str, decision: Any) -> Split:
        E, found = layer.facts.experts, Split()
        B, A = upright(layer, 0, side).shape
        roots = [torch.linalg.cholesky(moment_of(layer, e, side)).float() for e in range(E)]
        every = []
        for e in range(E):  # each on what it computes: W S, where S S^T is the moment of its inputs
            target_BA = upright(layer, e, side) @ roots[e]
            factors = Factors(target_BA)
            train(factors, target_BA, self.steps, self.lam, self.lr, self.seed)
            every.append(factors)
        ranks = share_out(every, int(self.keep * E * B * A / (B + A) + 1e-9), B * A // (B + A))
        for factors, root_AA, rank in zip(every, roots, ranks, strict=True):
            right_RA = torch.linalg.solve_triangular(root_AA, factors.v_RI.detach()[:rank], upper=False, left=False)
            found.add((factors.u_OR.detach()[:, :rank].T.contiguous(), right_RA))
        return found


def train(factors: Factors, target_BA: Tensor, steps: int, lam: float, lr: float, seed: int = 0) -> None:
    """Fit the product to a target, ranks in order of what they matter, in place; empty ranks are cut in between."""
    size = target_BA.square().sum().clamp(min=1e-30)
    for number in range(ROUNDS):
        sampler = RankSampler([factors], seed + number)
        optimiser = torch.optim.Adam(factors.parameters(), lr=lr, eps=EPS)
        with torch.enable_grad():
            for _ in range((steps * (number + 1)) // ROUNDS - steps * number // ROUNDS):
                _, rank = sampler.draw()
                full_BA = factors.u_OR @ factors.v_RI
                part_BA = factors.u_OR[:, :rank] @ factors.v_RI[:rank]
                off = (full_BA - target_BA).square().sum() + (part_BA - full_BA.detach()).square().sum()
                count = factors.u_OR.numel() + factors.v_RI.numel()
                optimiser.zero_grad()
                (off / size + lam * factors.lasso() / count).backward()
                optimiser.step()
        if steps:
            factors.shrink()


def share_out(every: list[Factors], total: int, most: int) -> list[int]:
    """A rank for each: together no more than `total`, where the products of suffix norms are largest; these fall with rank."""
    worth, of = [], []
    for e, factors in enumerate(every):
        u_R, v_R = factors.suffixes()
        worth.append((u_R * v_R).detach()[:most])
        of.append(torch.full((len(worth[-1]),), e))
    chosen = torch.cat(of)[torch.argsort(torch.cat(worth), descending=True, stable=True)[:total]]
    return torch.bincount(chosen, minlength=len(every)).tolist()
