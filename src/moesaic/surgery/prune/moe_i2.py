"""MoE-I2, stage 1: layers lose experts by how much they matter, and a genetic search says which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery import search
from moesaic.surgery.budget import apportion
from moesaic.surgery.layer import Change, Facts, Layer, Method, count_kept
from moesaic.surgery.reconstruct import Reconstruction


@register("prune", "moe_i2", paper="2411.01016", card="surgery-and-steering.md#moe-i2", exact=False, needs={"C"})
class MoeI2(Method):
    """The number of experts that a layer loses is proportional to 1 / its importance; their sum is that of `keep`.

    The paper's importance is the mean rise of the model's loss when one expert of the layer is masked, which needs the whole
    model: `moesaic.surgery.memory.masked_losses` measures it, to be given as `importance`. Without it, importance is the mean
    relative change of the layer's own output when one expert is masked. Which experts go is searched per layer; the choice
    among the best sets by windows of consecutive layers needs the whole model too: `memory.best_combination`. Details that
    the paper's abstract leaves open are the card's. Stage 2 (low rank) is a compress method.

    Args:
        keep: experts that stay, on average over the layers: a share, or a number per layer.
        importance: of each MoE layer, in order; measured on each layer alone by default.
        population, generations, mutation: of the genetic search; sets no more than the population are all tried.
        candidates: how many of the best sets the report names.
        tokens: tokens to compare on, evenly taken from the features.
        seed: of the search.
    """

    stock = False
    drops = uneven = True
    together = "it shares out what goes over the layers, by their importance"

    def __init__(
        self,
        keep: float | int = 0.75,
        importance: list[float] | None = None,
        population: int = 100,
        generations: int = 50,
        mutation: float = 0.1,
        candidates: int = 3,
        tokens: int = 1024,
        seed: int = 0,
    ) -> None:
        if min(population, generations, candidates, tokens) < 1 or not 0 <= mutation <= 1:
            raise BadInput("population, generations, candidates, tokens: at least 1; mutation: from 0 to 1")
        self.keep, self.importance, self.tokens, self.seed, self.candidates = keep, importance, tokens, seed, candidates
        self.population, self.generations, self.mutation = population, generations, mutation

    def plan(self, blocks: Sequence[Facts]) -> list[int]:
        """The average layer's counts: their sum is known, no more, until importance is."""
        if self.importance is None:
            return [count_kept(facts, self.keep) for facts in blocks]
        return self._counts(self.importance, blocks)

    def look(self, layer: Layer) -> float | None:
        if self.importance is not None:
            return None
        output = Reconstruction(layer, self.tokens)
        E = layer.facts.experts
        return sum(output.error((e,)) for e in range(E)) / E / max(output.size, 1e-30)

    def decide(self, looks: Sequence[Any], blocks: Sequence[Facts]) -> list[Any]:
        importance = list(looks) if self.importance is None else self.importance
        return list(zip(importance, self._counts(importance, blocks), strict=True))

    def _counts(self, importance: Sequence[float], blocks: Sequence[Facts]) -> list[int]:
        if len(importance) != len(blocks) or min(importance) < 0:
            raise BadInput(f"importance: one number, not below 0, for each of the {len(blocks)} MoE layers")
        groups = blocks[0].groups
        if any(facts.groups != groups for facts in blocks):
            raise BadInput("moe_i2: the layers' routers have different groups; prune them alike instead")
        drop = sum(facts.experts - count_kept(facts, self.keep) for facts in blocks)
        limits = [max(facts.experts - facts.least, 0) // groups for facts in blocks]
        inverse = [1 / max(value, 1e-12) for value in importance]
        lost = apportion(drop // groups, inverse, limits)
        return [facts.experts - groups * number for facts, number in zip(blocks, lost, strict=True)]

    def change(self, layer: Layer, decision: Any) -> Change:
        importance, count = decision
        facts = layer.facts
        report: dict[str, Any] = {"importance": importance}
        if count == facts.experts:
            return Change(range(facts.experts), report=report)
        output = Reconstruction(layer, self.tokens)
        found = search.genetic(
            output.error,
            facts.experts,
            facts.experts - count,
            facts.groups,
            population=self.population,
            generations=self.generations,
            mutation=self.mutation,
            seed=self.seed + facts.number,
            best=self.candidates,
        )
        report |= {"error": found[0][0], "candidates": [{"error": error, "dropped": list(gone)} for error, gone in found]}
        return Change([e for e in range(facts.experts) if e not in found[0][1]], report=report)
