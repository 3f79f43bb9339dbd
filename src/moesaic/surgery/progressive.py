"""Low rank + residual, trained: rows of the residual go one after another while all parts learn (MC-SMoE's second stage).

Shape legend: E experts, B outputs, A inputs, N rows of a residual of all experts of a layer, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.core.errors import BadInput
from moesaic.models.reshaped.factored import LEAF, Factors, fill, install
from moesaic.surgery.factored import SIDES, low_rank, upright
from moesaic.surgery.layer import Layer
from moesaic.surgery.objective import Given
from moesaic.surgery.recast import recast
from moesaic.surgery.recovery import Recovery
from moesaic.surgery.shapes import facts_of
from moesaic.view.block import Block, View

GONE = -1.0
"""Score of a row that went: below every row that stays, and never raised again."""


def cubic(step: int, steps: int, final: float, warm_up: int = 100, cool_down: int = 400) -> float:
    """The share of rows that is kept at a step of training: 1 up to `warm_up`, `final` from `steps - cool_down` on."""
    if step < warm_up:
        return 1.0
    if step >= steps - cool_down:
        return final
    return final + (1 - final) * (1 - (step - warm_up) / (steps - warm_up - cool_down)) ** 3


class RowPruner:
    """Scores rows [N, A] of several parameters while they learn, and zeroes all but ceil(share * rows) of them together.

    A row's score is a moving mean (`beta`) of the mean of |S * dL/dS| over it, taken where the gradient was, before clipping
    and the step. One threshold for all parameters: some may lose every row. A row that went stays away.
    """

    def __init__(self, rows: list[nn.Parameter], share: Callable[[int], float], beta: float = 0.85) -> None:
        self.rows, self.share, self.beta = rows, share, beta
        self.scores = [torch.zeros(len(p), device=p.device) for p in rows]
        self.handles = [p.register_hook(partial(self._seen, i)) for i, p in enumerate(rows)]

    def _seen(self, i: int, gradient_NA: Tensor) -> None:
        own_NA, score_N = self.rows[i].detach(), self.scores[i]
        now_N = (own_NA.float() * gradient_NA.float()).abs().mean(1)
        self.scores[i] = torch.where(score_N == GONE, score_N, self.beta * score_N + (1 - self.beta) * now_N)

    @torch.no_grad()
    def step(self, done: int) -> int:
        """Zero what has to be zero after step `done`; how many rows stay."""
        self.keep(math.ceil(self.share(done) * sum(map(len, self.rows)) - 1e-9))
        return sum(int((score_N != GONE).sum()) for score_N in self.scores)

    @torch.no_grad()
    def keep(self, count: int, cost_N: Tensor | None = None, room: float = math.inf) -> None:
        """Let the `count` best rows stay, and of them those from the best on whose costs fit the room."""
        score_N = torch.cat(self.scores)
        order_N = torch.argsort(score_N, descending=True, stable=True)[:count]
        order_N = order_N[score_N[order_N] != GONE]
        if cost_N is not None:
            order_N = order_N[cost_N.to(order_N.device)[order_N].double().cumsum(0) <= room]
        stays_N = torch.zeros(len(score_N), dtype=torch.bool, device=score_N.device)
        stays_N[order_N] = True
        for i, mine_N in enumerate(stays_N.split([len(score) for score in self.scores])):
            self.scores[i] = self.scores[i].masked_fill(~mine_N, GONE)
            self.rows[i].data.masked_fill_(~mine_N[:, None], 0)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


class Progressive(Recovery):
    """L, R and S of every expert learn (with the rest of the model, by `train`), on CE and KL to the model that came in.

    Experts that several router rows share are one parameter and learn from all of them. `rank(B, A)` of a matrix comes from
    the method; the share of rows that stays from `keep`, the share of the experts' bytes: rows are counted, as published, and
    where theirs of unequal length come to more bytes, the least important of them go at the end.
    """

    def __init__(
        self, rank: Callable[[int, int], int], keep: float, beta: float, warm_up: int, cool_down: int, **recovery: Any
    ) -> None:
        super().__init__(**recovery)
        if not 0 <= beta < 1 or min(warm_up, cool_down) < 0:
            raise BadInput(f"beta={beta}, warm_up={warm_up}, cool_down={cool_down}: a share below 1, and numbers of steps")
        self.rank, self.share, self.beta, self.warm_up, self.cool_down = rank, keep, beta, warm_up, cool_down
        self.told: dict[str, Any] = {}

    def plan(self, model: Any) -> dict[str, Any]:
        for block in View(model):
            if hasattr(block.experts, LEAF):
                raise BadInput(f"{block.name}: its experts are factors already")
        beside = {"all": " and all else", "moe": ", routers and shared experts", "experts": ""}[self.train]
        return {
            "stock": False,
            "reason": "needs `import moesaic` before it loads: experts are factors and rows",
            "trains": f"factors and rows of every expert{beside}, on CE and KL to the model before; rows go as they learn",
        }

    def prepare(self, model: Any, given: Given) -> list[nn.Parameter]:
        if given.steps <= self.warm_up + self.cool_down:
            raise BadInput(
                f"steps {given.steps}: warm_up={self.warm_up} and cool_down={self.cool_down} leave none in which rows go: "
                "more steps, or smaller ones"
            )
        super().prepare(model, given)
        view = View(model)
        self.blocks: list[Block] = list(view)
        whole = 0
        for facts, block in zip(facts_of(view), self.blocks, strict=True):
            whole += _factor(Layer(facts, block, None), self.rank)
        sides = [getattr(_factors(block), side) for block in self.blocks for side in SIDES]
        factors = sum(side.left.numel() + side.right.numel() for side in sides)
        self.cost_N = torch.cat([torch.full((len(side.rows),), side.width + 2.0) for side in sides])
        self.room, self.whole = self.share * whole - factors, whole
        final = min(1.0, max(0.0, self.room / float(self.cost_N.sum())))
        self.pruner = RowPruner(
            [side.rows for side in sides],
            lambda done: cubic(done, given.steps, final, self.warm_up, self.cool_down),
            self.beta,
        )
        return self.learning(model)

    def stepped(self, done: int) -> None:
        self.pruner.step(done)

    def state(self) -> dict[str, Tensor]:
        return {f"score.{i}": score_N for i, score_N in enumerate(self.pruner.scores)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.pruner.scores = [state[f"score.{i}"].to(score.device) for i, score in enumerate(self.pruner.scores)]

    def finish(self, model: Any) -> Any:
        self.pruner.close()
        self.pruner.keep(len(self.cost_N), self.cost_N, max(0.0, self.room))
        forms, stays = {}, iter(self.pruner.scores)
        rows: dict[str, dict[str, int]] = {}
        for block in self.blocks:
            forms[block.name] = _compact(block, {side: next(stays) != GONE for side in SIDES})
            rows[block.name] = {side: sum(forms[block.name][side]["rows"]) for side in SIDES}
        numel = sum(p.numel() for block in self.blocks for p in _factors(block).parameters())
        numel += 2 * sum(sum(mine.values()) for mine in rows.values())
        self.told = {"share": numel / self.whole, "rows": rows, "rank": forms[self.blocks[0].name]["first"]["ranks"][0]}
        return recast(model, forms)

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), **self.told}


def _factors(block: Block) -> Factors:
    return getattr(block.experts, LEAF)


def _factor(layer: Layer, rank: Callable[[int, int], int]) -> int:
    """W = L R + S in the place of a live block's matrices, S whole; how many numbers the matrices held.

    S is what is left of L R as the model's dtype holds them, so that their sum rounds only once more.
    """
    experts = layer.block.experts
    dtype, E = experts.down_proj.dtype, experts.down_proj.shape[0]
    form, bank, whole = dict[str, Any](), dict[str, Tensor](), 0
    for side in SIDES:
        lefts, rights, rests = [], [], []
        for e in range(E):
            own_BA = upright(layer, e, side)
            left, right = (part.to(dtype).float() for part in low_rank(own_BA, rank(*own_BA.shape)))
            lefts.append(left), rights.append(right), rests.append(own_BA - left.T @ right)  # type: ignore[func-returns-value]
        B = len(rests[0])
        form[side] = {"ranks": [len(left) for left in lefts], "base": False, "rows": [B] * E}
        bank |= {f"{side}.left": torch.cat(lefts), f"{side}.right": torch.cat(rights), f"{side}.rows": torch.cat(rests)}
        bank[f"{side}.index"] = torch.arange(B).repeat(E)
        whole += sum(rest.numel() for rest in rests)
    fill(install(experts, form), bank)
    return whole


def _compact(block: Block, stays: dict[str, Tensor]) -> dict[str, Any]:
    """Factors that hold only the rows that stay [N], in the place of a block's; their form."""
    old, form, bank = _factors(block), dict[str, Any](), dict[str, Tensor]()
    for side in SIDES:
        own = getattr(old, side)
        keep_N = stays[side]
        counts = [int(keep_N[low:high].sum()) for low, high in own.row_spans]
        form[side] = {"ranks": own.ranks, "base": False, "rows": counts}
        bank |= {f"{side}.left": own.left.data, f"{side}.right": own.right.data}
        bank |= {f"{side}.rows": own.rows.data[keep_N], f"{side}.index": own.index[keep_N]}
    like = old.first.left
    made = Factors(old.experts, old.width, old.inner, old.height, form, dtype=like.dtype, device=like.device)
    fill(made, bank)
    setattr(block.experts, LEAF, made)
    return form
