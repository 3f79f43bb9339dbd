"""Static: a fixed choice of resident experts, by earlier counts or by kTransformers' other masks; misses stream through.

Card serving-and-scale.md, "kTransformers: shared and hot experts on GPU, rest on CPU". Expert deferral changes the model
and is not here, nor is the choice anew after a long prompt.
"""

from __future__ import annotations

import numpy as np

from moesaic.core.errors import BadInput, MissingNeed
from moesaic.core.registry import register
from moesaic.trace.policies import state as S
from moesaic.trace.policies.masks import Kind, mask
from moesaic.trace.policies.policy import Policy


@register("policies", "static", card="serving-and-scale.md#ktransformers-shared-and-hot-experts-on-gpu-rest-on-cpu")
class Static(Policy):
    """`mask`: frequency (learnt), uniform, front_loading, back_loading or random. `host`: the host computes what is absent."""

    rule = S.GIVEN
    scope = "global"
    learns = True

    def __init__(self, mask: Kind = "frequency", seed: int = 42, host: bool = False) -> None:
        if mask not in ("frequency", "uniform", "front_loading", "back_loading", "random"):
            raise BadInput(f"mask {mask!r}: one of frequency, uniform, front_loading, back_loading, random")
        self.mask, self.seed = mask, seed
        self.where = S.ON_CPU if host else S.MOVE

    def setup(self) -> None:
        note = self.state.note
        note[S.ADMIT] = 0
        note[S.HOST_TOKENS] = np.iinfo(np.int64).max
        counts_LE = None if self.history is None else self.history.counts_LE
        if self.mask == "frequency" and counts_LE is None:
            raise MissingNeed("policy static counts earlier routing: give it with --learn-from FILE or --learn-share")
        chosen_LE = mask(self.mask, self.capacity_bytes, self.shape, counts_LE, self.seed)
        for layer, chosen_E in enumerate(chosen_LE):
            self.place(layer, np.flatnonzero(chosen_E))
