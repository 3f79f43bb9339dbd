"""AdaMoE retrofit: null experts behind a trained router, so that tokens may spend fewer real ones."""

from __future__ import annotations

from typing import Any

import torch

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.models.hosted.install import hosted_routers
from moesaic.surgery.retrofitting import Retrofitting
from moesaic.view.block import View

STARTS = ("copies", "mean")


@register("edit", "adamoe", paper="2406.13233", card="surgery-and-steering.md#adamoe-retrofit", exact=False)
class AdaMoE(Retrofitting):
    """routing/adamoe.py with `nulls` new rows and `k` slots over real and null ones; the load loss averages the nulls'.

    `start`: new row i copies real row i mod E (the released code; k + k nulls/E slots over c E copies give exactly the
    original top-k), or all rows are the real ones' mean, which no confident token prefers. The released loss indexes the
    wrong axis and hard-codes 8 experts: the paper's is used. By default twice the model's k over as many nulls as experts.
    """

    router = "adamoe"

    def __init__(
        self,
        nulls: int | None = None,
        k: int | None = None,
        start: str = "copies",
        balance: float = 0.01,
        train: str = "router",
    ) -> None:
        if start not in STARTS:
            raise BadInput(f"start={start!r}: one of {', '.join(STARTS)}")
        if balance < 0:
            raise BadInput(f"balance={balance}: must not be negative")
        super().__init__(train, {"adamoe": balance} if balance else None, k=k, nulls=nulls)
        self.starts = start

    def how(self, model: Any) -> dict[str, Any]:
        blocks = View(model)
        options = {"k": 2 * blocks[0].top_k, "nulls": blocks[0].num_experts, **self.router_options}
        return {**super().how(model), "router_options": options}

    @torch.no_grad()
    def start(self, model: Any, measured: Any) -> None:
        if self.starts == "mean":
            return  # where a retrofit starts by itself
        for hosted in hosted_routers(model):
            score: Any = hosted.router.score
            weight_RD, real = score.weight, hosted.num_experts
            rows = torch.arange(len(weight_RD) - real) % real
            weight_RD[real:] = weight_RD[rows]
