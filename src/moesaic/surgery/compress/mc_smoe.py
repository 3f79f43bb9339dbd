"""MC-SMoE's compression: a low-rank product plus the rows of the residual that matter most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.factored import SIDES, Factored, Split, low_rank, stacked, upright
from moesaic.surgery.layer import Change, Facts, Layer
from moesaic.surgery.objective import Objective
from moesaic.surgery.progressive import Progressive


@register(
    "compress",
    "mc_smoe",
    paper="2310.01334",
    card="surgery-and-steering.md#merge-then-compress",
    exact=False,
    needs={"B"},
)
class McSmoe(Factored):
    """W = L R + S: L R the best rank-r approximation, r = ceil(rho B A / (B + A)); of S the rows of largest importance stay,
    by one threshold over all layers (an expert can lose all of its rows).

    With a text to train on (`texts`, `training`), as published: L, R and S learn, the importance of S is a moving mean of
    |S dL/dS| by rows, and the share of rows that stays follows a cubic schedule (`surgery/progressive.py`). The published
    defaults, rho 0.15 and a quarter of the rows, are about keep=0.4. Without one S is pruned at once: dL/dS is dL/dW, so a
    row's importance is the mean of |S| times the root of the Fisher information of W (tier B). rho=0 prunes rows alone,
    rho=keep is low rank alone.

    Args:
        keep: share of the experts' bytes that stays: rho of them factors, the others rows.
        store: "factors" (smaller, needs `import moesaic`) or "dense" (multiplied out: stock, and no smaller; untrained only).
        rho: share of the parameters that factors take; no more than `keep`.
        beta: in training, of the moving mean.
        warm_up, cool_down: steps of training before the first row goes, and after the last one went.
        kd, temperature, task, train: of the training's loss and what learns; see `distill recover`.
    """

    remark = "rows go at once, without the published training: give it a text to train on for that"

    def __init__(
        self, keep: float = 0.5, store: str = "factors", rho: float = 0.15, beta: float = 0.85, warm_up: int = 100,
        cool_down: int = 400, kd: float = 0.2, temperature: float = 2.0, task: float = 1.0, train: str = "all",
    ) -> None:  # fmt: skip
        super().__init__(keep, store)
        if not 0 <= rho <= 1:
            raise BadInput(f"rho {rho}: a share from 0 to 1")
        self.rho = min(rho, self.keep)
        recovery = {"kd": kd, "temperature": temperature, "task": task, "train": train}
        self.trained = Progressive(self.rank, self.keep, beta, warm_up, cool_down, **recovery)

    def objective(self) -> Objective:
        if self.store == "dense":
            raise BadInput("store=dense: factors that learn are stored as factors; leave it out, or train no more")
        return self.trained

    def rank(self, outputs: int, inputs: int) -> int:
        most = self.keep * outputs * inputs / (outputs + inputs)
        return min(math.ceil(self.rho * outputs * inputs / (outputs + inputs)), int(most + 1e-9))

    def parts(self, layer: Layer, e: int, side: str) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Factors, residual [B, A], and the importance of its rows [B]."""
        own_BA = upright(layer, e, side)
        left, right = low_rank(own_BA, self.rank(*own_BA.shape))
        residual_BA = own_BA - left.T @ right
        sequences = layer.statistics["sequence_count"].clamp(min=1).float()
        gradient_BA = (stacked(layer, e, side, "fisher") / sequences).sqrt()
        return (left, right), residual_BA, (residual_BA.abs() * gradient_BA).mean(1)

    def look(self, layer: Layer) -> Any:
        """Of each side: importance of all rows [E, B], and what a row takes."""
        if self.keep == 1:
            return None
        found = {}
        for side in SIDES:
            scores_EB = torch.stack([self.parts(layer, e, side)[2] for e in range(layer.facts.experts)])
            B, A = upright(layer, 0, side).shape
            found[side] = scores_EB, A, self.keep * B * A - self.rank(B, A) * (B + A)
        return found

    def decide(self, looks: Sequence[Any], blocks: Sequence[Facts]) -> list[Any]:
        """Which rows stay: from the most important of the whole model on, until the bytes are spent."""
        if self.keep == 1:
            return list(looks)
        room = sum(len(scores_EB) * left for look in looks for scores_EB, _, left in look.values())
        score = torch.cat([scores_EB.flatten() for look in looks for scores_EB, _, _ in look.values()])
        cost = torch.cat([torch.full((scores_EB.numel(),), A + 2.0) for look in looks for scores_EB, A, _ in look.values()])
        order = torch.argsort(score, descending=True, stable=True)
        stays = torch.zeros(len(score), dtype=torch.bool)
        stays[order] = cost[order].double().cumsum(0) <= room
        found, at = [], 0
        for look in looks:
            mine = {}
            for side, (scores_EB, _, _) in look.items():
                mine[side] = stays[at : at + scores_EB.numel()].view(scores_EB.shape)
                at += scores_EB.numel()
            found.append(mine)
        return found

    def change(self, layer: Layer, decision: Any) -> Change:
        change = super().change(layer, decision)
        if decision is not None:
            change.report |= {f"{side}_rows": decision[side].sum(1).tolist() for side in SIDES}
        return change

    def split(self, layer: Layer, side: str, decision: Any) -> Split:
        found = Split()
        for e in range(layer.facts.experts):
            factors, residual_BA, _ = self.parts(layer, e, side)
            index_N = torch.nonzero(decision[side][e]).flatten()
            found.add(factors)
            found.rows.append((index_N, residual_BA[index_N]))
        return found
