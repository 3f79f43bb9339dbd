"""LFU: the expert that was used in the fewest events leaves; with a half-life, recency counts too.

Card serving-and-scale.md, "What helped" (recency-frequency scores) and MoE-Infinity's code variant "residency-LFU".
"""

from __future__ import annotations

import math

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.trace.policies import state as S
from moesaic.trace.policies.policy import Policy, Scope


@register("policies", "lfu", card="serving-and-scale.md#what-helped")
class LFU(Policy):
    """`half_life`: passes after which a use counts half (0: for ever the same). `while_resident`: counts start anew with
    every load, as in MoE-Infinity's dispatcher. `bypass_tokens`: see lru."""

    def __init__(
        self, scope: Scope = "layer", half_life: float = 0.0, while_resident: bool = False, bypass_tokens: int = 0
    ) -> None:
        if half_life < 0 or not math.isfinite(half_life):
            raise BadInput(f"half_life {half_life}: give 0 or more passes")
        if half_life and while_resident:
            raise BadInput("half_life and while_resident: choose one")
        self.scope, self.half_life, self.bypass_tokens = scope, half_life, bypass_tokens
        self.rule = S.RESIDENT_COUNT if while_resident else S.COUNT

    def setup(self) -> None:
        if self.half_life:
            self.state.number[S.GROWTH] = 2 ** (1 / self.half_life)
