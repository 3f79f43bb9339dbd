"""Merge methods: groups of experts become one expert each; what remains of the router is an option of all of them.

router:
- "map" (the default; as published): every row stays, and the rows of a group share their expert. Weights of chosen rows add
  up, so merging equal experts changes nothing. The checkpoint holds fewer experts than rows and needs `import moesaic`.
- "collapse": a row per group, the usage-weighted mean of its members' rows (and of their biases and scales); where the row's
  matrix has a bias, log(members) is added to it. A stock checkpoint when all layers keep as many. An approximation: the
  group's exact logit is the log-sum-exp of its members'.
- "repeat": every row stays, and the merged expert is written once per row. Stock, and saves nothing.

E experts, F experts afterwards, R router rows afterwards, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.surgery import average
from moesaic.surgery.align import aligned, check_align
from moesaic.surgery.cluster import Groups
from moesaic.surgery.layer import Change, Facts, Layer, Method, count_kept
from moesaic.view.bank import ExpertWeights

ROUTERS = ("map", "collapse", "repeat")
WEIGHTS = ("frequency", "mean")


class Merger(Method):
    """Base: a subclass gives `group`; `merge` may be replaced as well.

    Args:
        keep: experts that stay: a share, or a number per layer.
        router: "map", "collapse" or "repeat"; see this module.
        weights: of the average within a group: "frequency" (how often each was chosen) or "mean" (equal).
        align: bring neurons into the order of the group's centre first: "none", "weight" (by the matrices) or
            "activation" (by correlation on tier C's inputs).
    """

    def __init__(self, keep: float | int = 0.5, router: str = "map", weights: str = "frequency", align: str = "none") -> None:
        for name, value, known in (("router", router, ROUTERS), ("weights", weights, WEIGHTS)):
            if value not in known:
                raise BadInput(f"{name} {value!r}: one of {', '.join(known)}")
        check_align(align)
        self.keep, self.router, self.weights, self.align = keep, router, weights, align
        self.stock = router != "map"
        self.shares, self.drops = router == "map", router == "collapse"
        self.reads_rows = router == "collapse"
        self.needs = frozenset({"C"} if align == "activation" else ())

    def group(self, layer: Layer, members: list[int], count: int) -> tuple[Groups, list[int]]:
        """`members` in `count` groups, and the centre of each group."""
        raise NotImplementedError

    def merge(self, layer: Layer, group: list[int], centre: int, share_G: Tensor) -> ExpertWeights:
        """One expert of several; `share_G` sums to one."""
        own = aligned(layer, centre, [e for e in group if e != centre], self.align)
        return average.mean([layer.expert(e) if e == centre else own[e] for e in group], share_G)

    def usage(self, layer: Layer) -> Tensor:
        """How much each expert counts in an average, [E]."""
        if self.weights == "mean":
            return torch.ones(layer.facts.experts, dtype=torch.float64)
        return layer.statistics["selection_count"].double()

    def plan(self, blocks: Sequence[Facts]) -> list[int]:
        counts = [self.count(facts) for facts in blocks]
        return [facts.experts for facts in blocks] if self.router == "repeat" else counts

    def count(self, facts: Facts) -> int:
        """Experts of a block afterwards. Only a collapsed router needs as many as it chooses."""
        if self.router == "collapse":
            return count_kept(facts, self.keep)
        return count_kept(facts._replace(top_k=1, groups=1, chosen_groups=1), self.keep)

    def decide(self, looks: Sequence[Any], blocks: Sequence[Facts]) -> list[Any]:
        return [self.count(facts) for facts in blocks]

    def change(self, layer: Layer, decision: Any) -> Change:
        facts, count = layer.facts, int(decision)
        if count >= facts.experts:
            return Change(range(facts.experts))
        groups, centres = self._groups(layer, count)
        usage_E = self.usage(layer)
        merged = {
            place: self.merge(layer, group, centre, average.shares(usage_E[group]))
            for place, (group, centre) in enumerate(zip(groups, centres, strict=True))
            if len(group) > 1
        }
        return self._routed(layer, groups, centres, merged, usage_E)

    def _groups(self, layer: Layer, count: int) -> tuple[Groups, list[int]]:
        """In the order of their centres. With a collapsed group-limited router, experts are merged within its groups."""
        facts = layer.facts
        parts = facts.groups if self.router == "collapse" else 1
        size = facts.experts // parts
        found: list[tuple[int, list[int]]] = []
        for part in range(parts):
            groups, centres = self.group(layer, list(range(part * size, (part + 1) * size)), count // parts)
            found += zip(centres, groups, strict=True)
        found.sort()
        return [group for _, group in found], [centre for centre, _ in found]

    def _routed(
        self, layer: Layer, groups: Groups, centres: list[int], merged: dict[int, ExpertWeights], usage_E: Tensor
    ) -> Change:
        E = layer.facts.experts
        place_of = {e: place for place, group in enumerate(groups) for e in group}
        report: dict[str, Any] = {"groups": groups, "centres": centres, "router": self.router}
        if self.router == "map":
            return Change(
                centres, merged, range(E), row_to_expert=[place_of[e] for e in range(E)], scores=usage_E, report=report
            )
        if self.router == "repeat":
            keep = [centres[place_of[e]] for e in range(E)]
            new = {e: merged[place_of[e]] for e in range(E) if place_of[e] in merged}
            return Change(keep, new, range(E), scores=usage_E, report=report)
        mix_RE = average.mix(groups, usage_E)
        matrix_RD = mix_RE @ layer.rows_ED.cpu()
        shift_R = torch.tensor([math.log(len(group)) for group in groups])
        report["merged_into"] = [place_of[e] for e in range(E)]
        report["router_kl_nats"] = collapse_kl(layer, groups, matrix_RD, mix_RE, shift_R)
        return Change(
            centres, merged, centres, matrix_RD=matrix_RD, mix_RE=mix_RE, shift_R=shift_R, scores=usage_E, report=report
        )


def collapse_kl(layer: Layer, groups: Groups, matrix_RD: Tensor, mix_RE: Tensor, shift_R: Tensor) -> float | None:
    """KL in nats, mean over tier C's inputs, from the groups' exact probabilities (a softmax summed over members) to the
    collapsed router's softmax. None without features, or where the router does not see what the experts see.
    """
    if not layer.has_features:
        return None
    x_TD = layer.features()[0].float()
    bias_E = next((p.detach().float() for n, p in layer.block.router.named_parameters() if n == "bias"), None)
    if x_TD.shape[1] != layer.rows_ED.shape[1]:
        return None
    logits_TE, new_TR = x_TD @ layer.rows_ED.T, x_TD @ matrix_RD.T
    if bias_E is not None:
        logits_TE, new_TR = logits_TE + bias_E, new_TR + mix_RE @ bias_E + shift_R
    if not _are_its_logits(layer, x_TD[:8], logits_TE[:8]):
        return None
    logits_TE = logits_TE.double()
    exact_TR = torch.stack([torch.logsumexp(logits_TE[:, group], 1) for group in groups], 1).log_softmax(1)
    return float((exact_TR.exp() * (exact_TR - new_TR.double().log_softmax(1))).sum(1).mean())


def _are_its_logits(layer: Layer, x_TD: Tensor, logits_TE: Tensor) -> bool:
    """Whether the router, given x, scores like this (up to what a softmax does not see, and to the storage's precision)."""
    weight = layer.router_matrix()
    try:
        with torch.no_grad():
            own_TE = layer.block.route(x_TD.to(weight)).logits_TE.float()
    except BadInput:  # it wants more than x
        return False
    return torch.allclose(own_TE.softmax(1), logits_TE.softmax(1), atol=0.02)


def centre_of(group: list[int], usage_E: Tensor) -> int:
    """The most used member; ties to the lower number."""
    return group[int(usage_E[group].argmax())]
