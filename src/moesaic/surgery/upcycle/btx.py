"""Branch-Train-MiX: the FFNs of several fine-tuned copies of one model become the experts of a MoE; all else is averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.conversion import Outcome, Told, ToMoE
from moesaic.surgery.dense import Dense
from moesaic.surgery.gates import Gates
from moesaic.surgery.parts import Part
from moesaic.surgery.stock import moe_config, moe_layers


@register("upcycle", "btx", paper="2403.07816", card="surgery-and-steering.md#upcycling-baselines", exact=False)
class BTX(ToMoE):
    """FFN_i of model i is expert i in every layer (`every` 1); embeddings, attention, norms and head are the models' mean.

    Top-`k` with weights that sum to 1; router rows are random, or come from prompts (`Gates`), whose hidden states are those of
    the first model. Fine-tune it then (`moesaic train`, or the model's own loss, with its load loss at 0.01): before that a
    random router mixes experts that never met.
    """

    least, most = 2, 1024

    def __init__(self, k: int = 2, every: int = 1, router: str = "random", prompts: Any = None, seed: int = 0) -> None:
        self.k, self.every, self.how = k, every, (router, prompts, seed)

    def plan(self, models: Sequence[Dense]) -> Outcome:
        self.experts = len(models)
        if self.k > self.experts:
            raise BadInput(f"k={self.k}: {self.experts} models make {self.experts} experts")
        router, prompts, seed = self.how
        self.gates = Gates(router, self.experts, prompts, seed)
        config = moe_config(models[0].config, self.experts, self.k, every=self.every)
        config.router_aux_loss_coef = 0.01
        return self.outcome(models, config)

    def prepare(self, models: Sequence[Dense], told: Told) -> None:
        self.gates.prepare(models[0], moe_layers(self.config), told.trust_remote_code)

    def expert(self, models: Sequence[Dense], layer: int, e: int) -> dict[str, Part]:
        return dict(models[e].ffn(layer))

    def router(self, models: Sequence[Dense], layer: int) -> Part:
        return self.gates.part(models[0], layer)
