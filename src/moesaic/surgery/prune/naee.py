"""NAEE: try every set of experts to drop, and keep the one that moves the layer's output least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery import search
from moesaic.surgery.layer import Change, Facts, Layer, Method, count_kept
from moesaic.surgery.reconstruct import Reconstruction


@register("prune", "naee", paper="2402.14800", card="surgery-and-steering.md#naee", exact=False, needs={"R0", "C"})
class Naee(Method):
    """The error of a set is the summed norm of the change of the routed output, with the router's own top-k and weights.

    Exhaustive while the sets are at most `most`; beyond that, greedy: the cheapest expert goes, one after another. Layer by
    layer on the untouched model's features; the progressive variant, which needs a layer's features with the layers before
    it already pruned, is this method with `sequential` (surgery/sequential.py). An expert's outputs are computed once for
    all sets. The report gives the error, and for top-2 routers the median of w2 / w1 as `skip_beta`: skip the second expert
    where w2 < beta w1, which is the routing policy `threshold = skip_beta / (1 + skip_beta)`.

    Args:
        keep: experts that stay in every layer: a share, or a number.
        most: sets to try, at most, before the search is greedy.
        tokens: tokens to compare on, evenly taken from the features; their outputs of all experts are held in memory.
    """

    drops = True

    def __init__(self, keep: float | int = 0.75, most: int = 1000, tokens: int = 1024) -> None:
        if most < 1 or tokens < 1:
            raise BadInput(f"most {most}, tokens {tokens}: at least one of each")
        self.keep, self.most, self.tokens = keep, most, tokens

    def plan(self, blocks: Sequence[Facts]) -> list[int]:
        return [count_kept(facts, self.keep) for facts in blocks]

    def change(self, layer: Layer, decision: Any) -> Change:
        facts = layer.facts
        drop = facts.experts - count_kept(facts, self.keep)
        if not drop:
            return Change(range(facts.experts), report={"error": 0.0, "search": "none"})
        output = Reconstruction(layer, self.tokens)
        small = search.count(facts.experts, drop, facts.groups) <= self.most
        find = search.exhaustive if small else search.greedy
        error, dropped = find(output.error, facts.experts, drop, facts.groups)[0]
        report: dict[str, Any] = {
            "error": error, "relative_error": error / max(output.size, 1e-30), "search": find.__name__,
        }  # fmt: skip
        if facts.top_k == 2 and "second_over_first_hist" in layer.statistics.sums:
            report["skip_beta"] = layer.statistics.quantile("second_over_first", 0.5)
        return Change([e for e in range(facts.experts) if e not in dropped], report=report)
