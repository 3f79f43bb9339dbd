"""EdgeMoE: the experts of the two last layers predict the next one's; evict by frequency over distance in layers.

Card serving-and-scale.md, "EdgeMoE: per-expert bit-width and path dictionary". Bit widths are not here, nor is the end of
an encoder; passes of several tokens are predicted by what is usual.
"""

from __future__ import annotations

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.trace.policies import state as S
from moesaic.trace.policies.policy import Policy


@register(
    "policies", "edgemoe", paper="2308.14352", card="serving-and-scale.md#edgemoe-per-expert-bit-width-and-path-dictionary",
    needs={"history"},
)  # fmt: skip
class EdgeMoE(Policy):
    """`preload`: experts of the next layer to fetch, best first (0: the slots of a token). `paths`: (layer, token) pairs of
    the history that the dictionary is made from, at most."""

    rule = S.LAYER_AGE
    scope = "global"
    source = S.PATHS
    learns = True

    def __init__(self, preload: int = 0, paths: int = 1 << 20) -> None:
        if preload < 0:
            raise BadInput(f"preload {preload}: give 0 or more")
        self.preload, self.paths = preload, paths

    def remember(self) -> S.Memory:
        assert self.history is not None
        empty = super().remember()
        width = self.preload or self.shape.top_k
        keys, following = self.history.paths(width, self.paths)
        return empty._replace(keys_P=keys, next_PM=following, usual_LM=self.history.usual(width))

    def setup(self) -> None:
        assert self.history is not None
        self.state.note[S.WIDTH] = self.preload or self.shape.top_k
        self.state.real[S.KEEP] = self.history.counts_LE
