"""No cache: every expert is loaded before use and dropped after it, as ZeRO-Inference and accelerate do.

Card serving-and-scale.md, "DeepSpeed (ZeRO-Inference) and accelerate: expert-agnostic".
"""

from __future__ import annotations

from moesaic.core.registry import register
from moesaic.trace.policies import state as S
from moesaic.trace.policies.policy import Policy


@register("policies", "none", card="serving-and-scale.md#deepspeed-zero-inference-and-accelerate-expert-agnostic")
class Nothing(Policy):
    """`dense`: all experts of a layer move however few are used (stacked tensors); else each active one on demand."""

    rule = S.GIVEN

    def __init__(self, dense: bool = False) -> None:
        self.dense = dense

    def setup(self) -> None:
        self.state.note[S.ADMIT] = 0
        self.state.note[S.DENSE] = int(self.dense)
