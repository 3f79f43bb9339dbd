"""Defer: missing experts of a layer are added to the hidden state one layer later, while the next layer already runs.

kTransformers' expert deferral. Each is applied exactly once, to the hidden state that was routed to it; only the place where
its output enters is another.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Dispatch
from moesaic.serving.streamed.layer import Layer
from moesaic.serving.streamed.lossy.mode import Lossy

if TYPE_CHECKING:
    from moesaic.serving.streamed.engine import Engine


@register("lossy", "defer", card="serving-and-scale.md#ktransformers-shared-and-hot-experts-on-gpu-rest-on-cpu", exact=False)
class Defer(Lossy):
    """`experts`: at most so many of a layer are deferred in a pass, those of least weight; the last layer defers none. What
    finds no place in the cache is not deferred."""

    def __init__(self, experts: int = 2) -> None:
        if experts < 0:
            raise BadInput(f"defer: experts {experts}: give 0 or more")
        self.experts = experts
        self._goes_on: list[bool] = []

    @property
    def neutral(self) -> bool:
        return self.experts == 0

    def attach(self, engine: Engine) -> None:
        stacks = [re.sub(r"\d+", "#", layer.block.name) for layer in engine.layers]
        self._goes_on = [here == after for here, after in zip(stacks, [*stacks[1:], ""], strict=True)]

    def put_off(self, layer: Layer, dispatch: Dispatch, missing: list[int]) -> set[int]:
        if not self.experts or not self._goes_on[layer.number] or not missing:
            return set()
        weight_E = dispatch.weight_S.new_zeros(layer.experts).float()
        weight_E.index_add_(0, dispatch.expert_S, dispatch.weight_S.float().abs())
        return set(sorted(missing, key=lambda e: (float(weight_E[e]), e))[: self.experts])
