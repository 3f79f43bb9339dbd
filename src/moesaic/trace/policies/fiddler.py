"""Fiddler: popular experts on the device for good; a miss runs on the host, or is copied, whichever is cheaper.

Card serving-and-scale.md, "Fiddler: compute where the weights are".
"""

from __future__ import annotations

import math
from typing import Literal

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.trace.policies import state as S
from moesaic.trace.policies.masks import mask
from moesaic.trace.policies.policy import Policy


@register(
    "policies", "fiddler", paper="2402.07033", card="serving-and-scale.md#fiddler-compute-where-the-weights-are",
    needs={"history"},
)  # fmt: skip
class Fiddler(Policy):
    """`objective`: sum (each miss the cheaper way, which is the least sum) or makespan (the longer of both sums).

    `measured`: decide by the stated hardware; else by `latency_cpu` per token against `latency_gpu` per expert.
    """

    rule = S.GIVEN
    scope = "global"
    learns = True

    def __init__(
        self,
        objective: Literal["sum", "makespan"] = "sum",
        measured: bool = True,
        latency_cpu: float = 7.0,
        latency_gpu: float = 70.0,
    ) -> None:
        if objective not in ("sum", "makespan"):
            raise BadInput(f"objective {objective!r}: sum or makespan")
        if not (math.isfinite(latency_cpu) and math.isfinite(latency_gpu)) or min(latency_cpu, latency_gpu) < 0:
            raise BadInput(f"latency_cpu {latency_cpu}, latency_gpu {latency_gpu}: give 0 or more")
        self.measured, self.latency_cpu, self.latency_gpu = measured, latency_cpu, latency_gpu
        self.where = S.CHEAPEST if objective == "sum" else S.MAKESPAN

    def setup(self) -> None:
        assert self.history is not None
        note, number = self.state.note, self.state.number
        note[S.ADMIT], note[S.MEASURED] = 0, int(self.measured)
        number[S.CPU_COST], number[S.GPU_COST] = self.latency_cpu, self.latency_gpu
        chosen_LE = mask("frequency", self.capacity_bytes, self.shape, self.history.counts_LE)
        for layer, chosen_E in enumerate(chosen_LE):
            self.place(layer, chosen_E.nonzero()[0])
