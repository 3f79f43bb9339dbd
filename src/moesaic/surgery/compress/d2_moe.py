"""D²-MoE: one shared base per layer, and for each expert a low-rank difference that is fitted where its inputs lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.factored import Factored, Split, low_rank, moment_of, neurons_at, stacked, upright, whitened
from moesaic.surgery.layer import Facts, Layer

BASES = ("fisher", "frequency", "mean", "regmean")
SHARED = ("none", "right", "left")


@register("compress", "d2_moe", paper="2502.17298", card="surgery-and-steering.md#d2-moe", exact=False, needs={"R0", "R2"})
class D2Moe(Factored):
    """W_e = base + L_e R_e, with the factors of least error on the expert's own inputs (SVD of the difference times the
    Cholesky factor of their second moment, 1e-6 of its mean diagonal added; all experts' inputs for one with fewer tokens
    than inputs). The first product has the moment of x, the second that of h. Differences are taken from the base as it is
    stored: rounded, and without the neurons that were pruned; an expert that is the base has rank 0.

    One factor for all experts (`share`) is held once. A shared R comes from the SVD of all differences below one another,
    under the moment of all experts' inputs (the released code takes the mean of Cholesky factors, which belongs to no moment);
    a shared L from that of all side by side, each under its own, which is the best there is for its rank.

    Pruning the base drops inner neurons: their rows of gate and up, their columns of down, lowest mean h_j² |down_j|²
    first. The released code stores the base whole and picks neurons of the whole expert per batch, so that a token's answer
    depends on its neighbours; here what goes for good goes from the base alone, and what is picked is picked per token.

    Args:
        keep: share of the experts' bytes that stays; the base takes at most 1 / E of them, the rest is rank, equal for all.
        store: "factors" (smaller, needs `import moesaic`) or "dense" (multiplied out: stock, and no smaller).
        base: "fisher" (elementwise Fisher information times frequency, as published; reads tier B, for which the model is
            loaded whole), "frequency", "mean" or "regmean" (least squared error of outputs on the experts' inputs).
        whiten: false for the plain SVD of the difference.
        share: "none", "right" (published as V) or "left" (U).
        prune: share of the base's neurons that goes; 0.2 is published.
        dynamic: share of these that stays stored, and is left out per token where down_proj reads them, those of
            least |h_j| |down_j|; saves work in principle, no bytes and here no time. Not with store=dense.
    """

    def __init__(
        self, keep: float = 0.5, store: str = "factors", base: str = "fisher", whiten: bool = True, share: str = "none",
        prune: float = 0.0, dynamic: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(keep, store)
        for name, value, known in (("base", base, BASES), ("share", share, SHARED)):
            if value not in known:
                raise BadInput(f"{name} {value!r}: one of {', '.join(known)}")
        if not 0 <= prune < 1 or not 0 <= dynamic <= 1:
            raise BadInput(f"prune {prune}: a share from 0 to below 1; dynamic {dynamic}: one from 0 to 1")
        if dynamic and not prune:
            raise BadInput(f"dynamic {dynamic}: a share of what `prune` takes, which is nothing; give prune=0.2, say")
        if dynamic and store == "dense":
            raise BadInput(f"dynamic {dynamic} with store=dense: a multiplied-out matrix reads all inputs of every token")
        self.base, self.whiten, self.share, self.prune, self.dynamic = base, whiten, share, prune, dynamic
        if base == "fisher" and keep < 1:
            self.needs = frozenset({"B"})

    def plan(self, blocks: Sequence[Facts]) -> list[int]:
        for facts in blocks:
            least = (1 - self.prune * (1 - self.dynamic)) / facts.fewest
            if self.keep < least:
                took = f"1/{facts.fewest}" if self.prune == 0 else f"{least:.3f}"
                raise BadInput(f"keep {self.keep}: the base alone takes {took} of {facts.name}: keep {least:.3f} or more")
        return super().plan(blocks)

    def split(self, layer: Layer, side: str, decision: Any) -> Split:
        found = self.common(layer, side)
        E, whole_BA = layer.facts.experts, upright(layer, 0, side)
        B, A = whole_BA.shape
        lefts, rights = (1 if self.share == name else E for name in ("left", "right"))
        room = int((self.keep * E * B * A - found.numel) / (lefts * B + rights * A) + 1e-9)
        rank = max(0, min(room, B * (E // rights), A * (E // lefts)))
        base_BA = found.base_like(whole_BA)
        deltas = [upright(layer, e, side) - base_BA for e in range(E)]
        if self.share == "none":
            for e, delta_BA in enumerate(deltas):
                if not rank or not bool(delta_BA.any()):
                    found.add((whole_BA.new_zeros(0, B), whole_BA.new_zeros(0, A)))
                elif self.whiten:
                    found.add(whitened(delta_BA, moment_of(layer, e, side), rank))
                else:
                    found.add(low_rank(delta_BA, rank))
            return found
        found.shared = self.share
        if not any(bool(delta_BA.any()) for delta_BA in deltas):
            rank = 0
        if self.share == "right":
            left, right = self.shared_right(layer, side, deltas, rank)
        else:
            left, right = self.shared_left(layer, side, deltas, rank)
        found.left, found.right = left, right
        return found

    def shared_right(self, layer: Layer, side: str, deltas: list[Tensor], rank: int) -> tuple[list[Tensor], list[Tensor]]:
        """L_e of each expert, and the one R of least sum of squared errors on all experts' inputs."""
        stack = torch.cat(deltas)
        left, right = whitened(stack, moment_of(layer, None, side), rank) if self.whiten else low_rank(stack, rank)
        return [part.contiguous() for part in left.split(len(deltas[0]), dim=1)], [right]

    def shared_left(self, layer: Layer, side: str, deltas: list[Tensor], rank: int) -> tuple[list[Tensor], list[Tensor]]:
        """The one L, orthonormal, of least sum of squared errors, each expert's on its own inputs; R_e = L^T difference."""
        row = [delta_BA.double() for delta_BA in deltas]
        if self.whiten:
            row = [d_BA @ torch.linalg.cholesky(moment_of(layer, e, side)) for e, d_BA in enumerate(row)]
        u_BK = torch.linalg.svd(torch.cat(row, 1), full_matrices=False)[0][:, :rank]
        return [u_BK.T.float().contiguous()], [(u_BK.T @ delta_BA.double()).float() for delta_BA in deltas]

    def common(self, layer: Layer, side: str) -> Split:
        """The base, as it is stored."""
        found = Split(base=self.mean(layer, side).to(layer.block.experts.down_proj.dtype).float())
        assert found.base is not None
        gone = int(self.prune * layer.facts.inner)
        picked = int(gone * self.dynamic)
        if gone > picked:
            stays_N = self.neurons(layer, gone - picked)
            if side == "down":
                found.inputs, found.base = stays_N, found.base[:, stays_N]
            else:
                found.outputs = neurons_at(layer, stays_N)
                found.base = found.base[found.outputs]
        if picked and side == "down":
            found.active = layer.facts.inner - gone
        return found

    def neurons(self, layer: Layer, gone: int) -> Tensor:
        """Which of the base's neurons stay, in order: all but those whose own part of the base's output is least."""
        square_I = layer.statistics["inner_gram_sum"].double().sum(0).diagonal()
        size_I = square_I * self.mean(layer, "down").double().square().sum(0)
        return torch.argsort(size_I, descending=True, stable=True)[: len(size_I) - gone].sort().values

    def mean(self, layer: Layer, side: str) -> Tensor:
        """The base [B, A]: a weighted mean, plain where no expert has any weight. What is added up are differences from the
        first expert, so that the mean of equal experts is their bytes.
        """
        if self.base == "regmean":
            return regmean(layer, side)
        E, frequency_E = layer.facts.experts, layer.statistics["selection_count"].float()
        zero_BA = upright(layer, 0, side)
        total_BA, weight_BA, plain_BA = (torch.zeros_like(zero_BA) for _ in range(3))
        for e in range(E):
            own_BA = upright(layer, e, side) - zero_BA
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
            return zero_BA + plain_BA
        found_BA = total_BA / weight_BA.clamp(min=torch.finfo(torch.float32).tiny)
        return zero_BA + torch.where(weight_BA > 0, found_BA, plain_BA)


def regmean(layer: Layer, side: str, damp: float = 1e-6) -> Tensor:
    """The matrix [B, A] of least sum over experts of ||(W_e - M) X_e||²: (Σ W_e G_e)(Σ G_e)^-1, X_e an expert's inputs and
    G_e = X_e X_e^T.

    Every G_e gets `damp` times the mean diagonal of all, so that an expert without tokens still counts a little.
    """
    sums_EAA = layer.statistics["input_gram_sum" if side == "first" else "inner_gram_sum"].double()
    E, A = sums_EAA.shape[:2]
    size = float(sums_EAA.diagonal(dim1=1, dim2=2).mean())
    more_AA = torch.eye(A, dtype=torch.float64) * (damp * size if size > 0 else 1.0)
    zero_BA, total_BA = upright(layer, 0, side).double(), torch.zeros((), dtype=torch.float64)
    for e in range(1, E):
        total_BA = total_BA + (upright(layer, e, side).double() - zero_BA) @ (sums_EAA[e] + more_AA)
    return (zero_BA + torch.linalg.solve(sums_EAA.sum(0) + E * more_AA, total_BA, left=False)).float()
