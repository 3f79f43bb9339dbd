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

    def plan(self, blocks: Sequence[Facts]) -> list[int]:
        return [count_kept(facts, self.keep) for facts in blocks]

    def change(self, layer: Layer, decision: Any) -> Change:
        facts, statistics = layer.facts, layer.statistics
        score_E = statistics["gate_sum"].double() / statistics["token_count"].clamp(min=1)
        kept = best(score_E, count_kept(facts, self.keep), facts.groups)
        if len(kept) == facts.experts:
            return Change(kept, scores=score_E)
        moved = self._hand_on(layer, kept)
        experts = {
            place: self._recombined(layer, kept[place], [(e, mine[to == place]) for e, mine, to in moved], score_E)
            for place in range(len(kept))
            if any(bool((to == place).any()) for _, _, to in moved)
        }
        counts_XF = {e: torch.bincount(to[to >= 0], minlength=len(kept)) for e, _, to in moved}
        matrix_RD = None
        if self.rows and experts:
            matrix_RD = layer.rows_ED[kept].clone()
            for e, count_F in counts_XF.items():
                matrix_RD += count_F[:, None].float() / facts.inner * layer.rows_ED[e]
        report = {"moved": {e: count_F.tolist() for e, count_F in counts_XF.items()}, "neurons": facts.inner}
        return Change(kept, experts, matrix_RD=matrix_RD, scores=score_E, report=report)

    def _hand_on(self, layer: Layer, kept: list[int]) -> list[tuple[int, Tensor, Tensor]]:
        """For each dropped expert its neurons [I, W] and where each goes: a place in `kept`, or -1."""
        if self.alpha > 1:
            return []
        dropped = [e for e in range(layer.facts.experts) if e not in set(kept)]
        given = [(e, neurons.rows(layer.expert(e))) for e in dropped]
        like = layer.expert(kept[0])
        units = [neurons.compared(mine, like, self.gate, self.normalise) for _, mine in given]
        best_X = [(torch.full((len(unit),), -2.0), torch.full((len(unit),), -1)) for unit in units]
        for place, e in enumerate(kept):  # one kept expert at a time: nothing is as large as the bank
            others_SW = neurons.compared(neurons.rows(layer.expert(e)), like, self.gate, self.normalise)
            for i, unit in enumerate(units):
                value, _ = neurons.nearest(unit, others_SW)
                held, to = best_X[i]
                better = value > held
                best_X[i] = (torch.where(better, value, held), torch.where(better, place, to))
        found = zip(given, best_X, strict=True)
        return [(e, mine, torch.where(value > self.alpha, to, -1)) for (e, mine), (value, to) in found]

    def _recombined(self, layer: Layer, e: int, given: list[tuple[int, Tensor]], score_E: Tensor) -> ExpertWeights:
        like = layer.expert(e)
        own = neurons.rows(like)
        every = torch.cat([own, *(part for _, part in given)])
        sources = [(e, own), *given]
        weight_S = torch.cat([torch.full((len(part),), float(score_E[source])) for source, part in sources])
        if float(weight_S.sum()) <= 0:
            weight_S = torch.ones_like(weight_S)
        first_S = neurons.magnitude(every, like)
        made = neurons.recombine(every, weight_S.clamp(min=1e-12), first_S, len(own), len(own), self.rounds)
        return neurons.from_rows(made, like)
