"""DERN: drop experts, hand their neurons to the kept experts with the most similar ones, and cluster each back to size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery import neurons
from moesaic.surgery.layer import Change, Facts, Layer, Method, best, count_kept
from moesaic.view.bank import ExpertWeights

CARD = "surgery-and-steering.md#dropping-experts-recombining-neurons"


@register("prune", "dern", paper="2509.10377", card=CARD, exact=False, needs={"R0"})
class Dern(Method):
    """Importance s(e) is the mean over tokens of the weight given to e (as the experts were called: normalised where the
    router normalises). Each neuron of a dropped expert goes to the kept expert that owns the nearest neuron by cosine, if
    that is above `alpha`; else it is gone. Kept experts that were given neurons are clustered back to their own width,
    neurons weighing as much as the expert they come from; those that were given none stay byte for byte. The row of a kept
    expert gets the dropped rows added by the share of neurons that came: rows add logits, so this is a heuristic, and even
    merging exact copies changes the routing.

    No official code: the procedure follows a detailed account. A bias of a neuron travels in its row; the bias of the second
    product belongs to no neuron and stays the kept expert's. In experts without a gate, the first centres are chosen by the
    up row. An empty cluster takes one of the kept expert's own neurons.

    Args:
        keep: experts that stay in every layer: a share, or a number.
        alpha: least cosine for a neuron to be handed on; above 1 nothing is, and this is pruning by gate mass.
        gate: whether gate rows count in the similarity (without is reported slightly better).
        normalise: bring gate row, up row and down column to unit length each before they are compared.
        rows: add to the kept experts' router rows. Needs a router that is a matrix with a row per expert.
        rounds: of the clustering, at most.
    """

    drops = True

    def __init__(
        self,
        keep: float | int = 0.5,
        alpha: float = 0.6,
        gate: bool = True,
        normalise: bool = False,
        rows: bool = True,
        rounds: int = 30,
    ) -> None:
        if rounds < 1:
            raise BadInput(f"rounds {rounds}: at least 1")
        self.keep, self.alpha, self.gate, self.normalise, self.rows, self.rounds = keep, alpha, gate, normalise, rows, rounds
        self.reads_rows = rows

    def plan(self, blocks: Sequence[Facts]) -> list[int]:
        return [count_kept(facts, self.keep) for facts in blocks]

    def change(self, layer: Layer, decision: Any) -> Change:
        facts, statistics = layer.facts, layer.statistics
        score_E = statistics["gate_sum"].double() / statistics["token_count"].clamp(min=1)
        kept = best(score_E, count_kept(facts, self.keep), facts.groups)
        if len(kept) == facts.experts:
            return Change(kept, scores=score_E)
        to_X = self._hand_on(layer, kept)
        experts = {
            place: self._recombined(layer, kept[place], {e: to == place for e, to in to_X.items()}, score_E)
            for place in range(len(kept))
            if any(bool((to == place).any()) for to in to_X.values())
        }
        counts_XF = {e: torch.bincount(to[to >= 0], minlength=len(kept)) for e, to in to_X.items()}
        matrix_RD = None
        if self.rows and experts:
            matrix_RD = layer.rows_ED[kept].clone()
            for e, count_F in counts_XF.items():
                matrix_RD += count_F[:, None].float() / facts.inner * layer.rows_ED[e]
        report = {"moved": {e: count_F.tolist() for e, count_F in counts_XF.items()}, "neurons": facts.inner}
        return Change(kept, experts, matrix_RD=matrix_RD, scores=score_E, report=report)

    def _hand_on(self, layer: Layer, kept: list[int]) -> dict[int, Tensor]:
        """For each dropped expert, where each of its neurons goes: a place in `kept`, or -1. Two experts are compared at a
        time, so that no float32 copy of the bank exists."""
        dropped = [e for e in range(layer.facts.experts) if e not in set(kept)] if self.alpha <= 1 else []
        return {e: self._places(layer, e, kept) for e in dropped}

    def _places(self, layer: Layer, e: int, kept: list[int]) -> Tensor:
        mine_IW = self._compared(layer, e)
        most_I, to_I = torch.full((len(mine_IW),), -2.0), torch.full((len(mine_IW),), -1)
        for place, other in enumerate(kept):
            value_I, _ = neurons.nearest(mine_IW, self._compared(layer, other))
            to_I = torch.where(value_I > most_I, place, to_I)
            most_I = torch.maximum(most_I, value_I)
        return torch.where(most_I > self.alpha, to_I, -1)

    def _compared(self, layer: Layer, e: int) -> Tensor:
        expert = layer.expert(e)
        return neurons.compared(neurons.rows(expert), expert, self.gate, self.normalise)

    def _recombined(self, layer: Layer, e: int, given: dict[int, Tensor], score_E: Tensor) -> ExpertWeights:
        like = layer.expert(e)
        own = neurons.rows(like)
        sources = [(e, own)]
        sources += [(source, neurons.rows(layer.expert(source))[mine]) for source, mine in given.items() if bool(mine.any())]
        every = torch.cat([part for _, part in sources])
        weight_S = torch.cat([torch.full((len(part),), float(score_E[source])) for source, part in sources])
        if float(weight_S.sum()) <= 0:
            weight_S = torch.ones_like(weight_S)
        first_S = neurons.magnitude(every, like)
        made = neurons.recombine(every, weight_S.clamp(min=1e-12), first_S, len(own), len(own), self.rounds)
        return neurons.from_rows(made, like)
