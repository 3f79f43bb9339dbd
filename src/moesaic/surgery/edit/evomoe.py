"""EvoMoE: every expert becomes a varied copy of one, and a gate that cools from dense to sparse trains them apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.experts.spawn import spawn
from moesaic.models.hosted.install import hosted_routers
from moesaic.surgery.objective import Given
from moesaic.surgery.retrofitting import Retrofitting
from moesaic.view.block import View

ROUTERS = ("zeros", "random", "keep")


@register("edit", "evomoe", paper="2112.14397", card="surgery-and-steering.md#evomoe", exact=False)
class EvoMoE(Retrofitting):
    """Phase 2 and 3 on a trained MoE: copies of expert `source` with every matrix masked, then the dense-to-sparse gate.

    Each copy loses a random share `zeroed` of its entries and the rest grows by 1 / (1 - zeroed) (the released code has no
    such phase; the card's choice). The gate (routing/evomoe.py) trains with its temperature falling from `hot` to `cold`
    over the steps, and its balance loss. `router` is how its rows start: zeros, N(0, 0.02^2), or as they are.
    With `fixed` the model then runs its own top-k on the trained rows, which is stock; else the gate stays in it, and
    evaluation is its argmax.
    """

    router = "evomoe"

    def __init__(
        self,
        source: int = 0,
        zeroed: float = 0.2,
        rows: str = "random",
        hot: float = 2.0,
        cold: float = 0.3,
        balance: float = 0.01,
        fixed: bool = True,
        train: str = "router+experts",
    ) -> None:
        if rows not in ROUTERS:
            raise BadInput(f"rows={rows!r}: one of {', '.join(ROUTERS)}")
        if not 0 <= zeroed < 1 or hot <= 0 or cold <= 0 or balance < 0:
            raise BadInput(
                f"zeroed={zeroed}, hot={hot}, cold={cold}, balance={balance}: a share below 1, positive temperatures"
            )
        super().__init__(train, {"evomoe": balance} if balance else None)
        self.source, self.zeroed, self.rows, self.hot, self.cold, self.fixed = source, zeroed, rows, hot, cold, fixed

    def plan(self, model: Any) -> dict[str, Any]:
        facts = super().plan(model)
        for block in View(model):
            if not 0 <= self.source < block.num_experts:
                raise BadInput(f"source={self.source}: {block.name} has experts 0 to {block.num_experts - 1}")
        if self.fixed:
            facts |= {"stock": True, "reason": "after training it runs the architecture's own top-k on the trained rows"}
        return facts

    def prepare(self, model: Any, given: Given) -> list[nn.Parameter]:
        cooling = {"schedule": "linear", "start": self.hot, "end": self.cold, "steps": max(1, given.steps)}
        self.router_options = {"tau": cooling}
        return super().prepare(model, given)

    def measure(self, model: Any, given: Given) -> int:
        return given.seed

    @torch.no_grad()
    def start(self, model: Any, measured: int) -> None:
        for block in View(model):
            random = torch.Generator(block.experts.down_proj.device).manual_seed(measured * 1009 + block.layer)
            spawn(block.bank, self.source, self.zeroed, generator=random, every_matrix=True, rescale=True)
        for hosted in hosted_routers(model):
            score: Any = hosted.router.score
            weight_ED = score.weight
            if self.rows != "keep":
                weight_ED.zero_() if self.rows == "zeros" else weight_ED.normal_(std=0.02)

    def finish(self, model: Any) -> Any:
        return self.done.hand_back() if self.fixed else super().finish(model)
