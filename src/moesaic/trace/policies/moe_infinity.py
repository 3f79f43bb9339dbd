"""MoE-Infinity: match the running request to earlier ones; prefetch and keep what the nearest of them used.

Card serving-and-scale.md, "MoE-Infinity: request-level activation traces drive caching"; where paper and code differ, the
paper. Prefill and decoding are counted and matched apart.
"""

from __future__ import annotations

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.trace.policies import state as S
from moesaic.trace.policies.learned import store_request
from moesaic.trace.policies.policy import Policy


@register(
    "policies", "moe_infinity", paper="2401.14361",
    card="serving-and-scale.md#moe-infinity-request-level-activation-traces-drive-caching",
)  # fmt: skip
class MoEInfinity(Policy):
    """`library`: stored requests of each phase. `prefetch_layers`: layers to prefetch for (0: none, -1: all to come).

    Finished requests of the replay itself join the library; a history fills it before.
    """

    rule = S.MATCHED
    scope = "global"
    source = S.MATCH
    learns = True

    def __init__(self, library: int = 120, prefetch_layers: int = -1) -> None:
        if library < 1:
            raise BadInput(f"library {library}: at least 1 request")
        if prefetch_layers < -1:
            raise BadInput(f"prefetch_layers {prefetch_layers}: -1, 0 or a number of layers")
        self.library, self.prefetch_layers = library, prefetch_layers

    def remember(self) -> S.Memory:
        memory = S.new_memory(len(self.shape.experts_L), int(self.shape.experts_L.max()), self.library)
        if self.history is not None:
            for phase, counts_LE in self.history.requests:
                store_request(memory, phase, counts_LE)
        return memory

    def setup(self) -> None:
        layers = len(self.shape.experts_L)
        note = self.state.note
        note[S.DEPTH] = layers if self.prefetch_layers < 0 else self.prefetch_layers
        note[S.SOURCE] = S.MATCH if note[S.DEPTH] else S.NOTHING
        note[S.ONLY_BETTER] = 1
        self.state.factor[S.SCALE] = 1 - np.arange(layers) / layers
