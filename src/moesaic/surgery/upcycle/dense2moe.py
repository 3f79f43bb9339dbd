"""Dense2MoE: the most important neurons of an FFN become a shared expert, the others are dealt to small routed ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.conversion import Outcome, Told, ToMoE, neurons
from moesaic.surgery.dense import Dense
from moesaic.surgery.gates import Gates
from moesaic.surgery.parts import Part
from moesaic.surgery.passes import opened, rows, taylor
from moesaic.surgery.stock import moe_config

SCORES = ("taylor", "magnitude", "random")


@register("upcycle", "dense2moe", paper="2510.09094", card="surgery-and-steering.md#dense2moe", exact=False)
class Dense2MoE(ToMoE):
    """Per layer the I * `shared` neurons of highest score form the shared expert; the rest, in order of score, is dealt round
    and round to `experts` routed ones, of which a token runs `k`. Every neuron stands in exactly one.

    Scores: `taylor` (sum over a neuron's weights of |dL/dw * w|, L the model's loss on the text: a backward pass, the model in
    memory), `magnitude` (sum of |w|), `random`. How the paper deals is not stated; round-robin by rank is the card's choice.
    The paper's weights are a softmax's, not renormalised: so Qwen2-MoE runs them; Qwen3 becomes GLM-4-MoE, whose sigmoids are
    renormalised. Outputs shrink at first, and are brought back by training (the paper distils). Its routing over blocks
    (Mixture of Blocks) needs a conditioning vector, which text models lack, and has no part here.
    """

    def __init__(
        self, experts: int = 12, k: int = 2, shared: float = 0.25, score: str = "taylor", router: str = "random",
        prompts: Any = None, seed: int = 0,
    ) -> None:  # fmt: skip
        if score not in SCORES:
            raise BadInput(f"score={score!r}: one of {', '.join(SCORES)}")
        if not 0 < shared < 1:
            raise BadInput(f"shared={shared}: a share of the neurons, above 0 and below 1")
        self.experts, self.k, self.share, self.score, self.seed = experts, k, shared, score, seed
        self.gates = Gates(router, experts, prompts, seed)
        self.order: list[Tensor] = []

    def needs(self) -> int:
        return int(self.score == "taylor")

    def plan(self, models: Sequence[Dense]) -> Outcome:
        inner = models[0].config.intermediate_size
        self.top = round(inner * self.share)
        if (inner - self.top) % self.experts or inner == self.top:
            raise BadInput(
                f"experts={self.experts}, shared={self.share}: {inner} neurons less {self.top} shared ones are not dealt "
                f"evenly to {self.experts} experts"
            )
        self.width = (inner - self.top) // self.experts
        softmax = models[0].config.model_type != "qwen3"
        config = moe_config(models[0].config, self.experts, self.k, inner=self.width, normalised=not softmax, shared=self.top)
        outcome = self.outcome(models, config)
        live = 3 * models[0].table.nbytes if self.score == "taylor" else 0
        return outcome._replace(peak_bytes=max(outcome.peak_bytes, live))

    def prepare(self, models: Sequence[Dense], told: Told) -> None:
        dense = models[0]
        layers = range(dense.layers)
        self.gates.prepare(dense, layers, told.trust_remote_code)
        self.order = [torch.argsort(score, descending=True, stable=True) for score in self._scores(dense, told)]

    def _scores(self, dense: Dense, told: Told) -> Tensor:
        """[L, I]."""
        if self.score == "taylor":
            model, tokenizer = opened(dense.folder, told.trust_remote_code)
            documents = [document for each in told.texts.values() for document in each]
            return taylor(model, rows(tokenizer, documents, told.seq_len, told.max_tokens))
        if self.score == "random":
            random = torch.Generator().manual_seed(self.seed)
            return torch.rand(dense.layers, dense.config.intermediate_size, generator=random)
        found = []
        for layer in range(dense.layers):
            gate, up, down = (dense.read(part).float().abs() for part in dense.ffn(layer).values())
            found.append(gate.sum(1) + up.sum(1) + down.sum(0))
        return torch.stack(found)

    def kept(self, layer: int, e: int | None) -> Tensor:
        """Neurons of expert e, or of the shared one (None), in ascending order."""
        order = self.order[layer]
        return (order[: self.top] if e is None else order[self.top + e :: self.experts]).sort().values

    def shared(self, models: Sequence[Dense], layer: int) -> dict[str, Part]:
        return neurons(models[0].ffn(layer), self.kept(layer, None), models[0])

    def expert(self, models: Sequence[Dense], layer: int, e: int) -> dict[str, Part]:
        return neurons(models[0].ffn(layer), self.kept(layer, e), models[0])

    def router(self, models: Sequence[Dense], layer: int) -> Part:
        return self.gates.part(models[0], layer)

    def report(self, layer: int) -> dict[str, Any]:
        return {
            "shared_neurons": self.kept(layer, None).tolist(),
            "neurons": [self.kept(layer, e).tolist() for e in range(self.experts)],
        }
