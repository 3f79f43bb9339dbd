"""UNCURL: for one task, spectral clusters of the experts by how the router scores them on it, merged by usage."""

from __future__ import annotations

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.cluster import Groups, spectral
from moesaic.surgery.layer import Layer
from moesaic.surgery.merging import Merger, centre_of
from moesaic.surgery.similarity import similarity
from moesaic.trace.calibration.store import LayerStatistics


@register("merge", "uncurl", paper="2409.01483", card="surgery-and-steering.md#uncurl", exact=False, needs={"R0"})
class Uncurl(Merger):
    """Affinity is the cosine of logit columns on the task's tokens, mapped to [0, 1]; as many groups in every layer.

    The statistics must be the task's: calibrate on its text, or by domain and name it. No code was released: spectral step,
    alignment to the most used member and the mean router row are the card's reading of the paper, and so is the k-means that
    draws no numbers. Meant to be fine-tuned on the task afterwards.

    Args:
        keep: experts that stay: a share, or a number per layer.
        router: "collapse" (the card's: a row per group), "map" or "repeat".
        weights: of the average within a group: "frequency" or "mean".
        align: "weight", "activation" or "none".
        domain: whose statistics to read, of a calibration by domain; all text by default.
    """

    def __init__(
        self,
        keep: float | int = 0.5,
        router: str = "collapse",
        weights: str = "frequency",
        align: str = "weight",
        domain: str | None = None,
    ) -> None:
        super().__init__(keep, router, weights, align)
        self.domain = domain
        self.needs |= set() if domain is None else {"D"}

    def _task(self, layer: Layer) -> LayerStatistics:
        if self.domain is None:
            return layer.statistics
        if self.domain not in layer.by_domain:
            known = ", ".join(filter(None, layer.by_domain)) or "none"
            raise BadInput(f"domain {self.domain!r}: the calibration has {known}; calibrate with --by-domain")
        return layer.by_domain[self.domain]

    def usage(self, layer: Layer):
        if self.weights == "mean":
            return super().usage(layer)
        return self._task(layer)["selection_count"].double()

    def group(self, layer: Layer, members: list[int], count: int) -> tuple[Groups, list[int]]:
        task = self._task(layer)
        view = Layer(layer.facts, layer.block, task)
        affinity_EE = similarity(view, "router_logits")[members][:, members]
        found = [[members[i] for i in group] for group in spectral(affinity_EE, count)]
        return found, [centre_of(group, task["selection_count"]) for group in found]
