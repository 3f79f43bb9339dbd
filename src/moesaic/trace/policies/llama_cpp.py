"""llama.cpp: whole layers on the device, the host computes the others; long prompts copy what they use.

Card serving-and-scale.md, "llama.cpp: static split by tensor name, CPU computes the rest". The experts of the first layers
stay on the host (`--n-cpu-moe`), as many as do not fit.
"""

from __future__ import annotations

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.trace.policies import state as S
from moesaic.trace.policies.masks import mask
from moesaic.trace.policies.policy import Policy


@register("policies", "llama_cpp", card="serving-and-scale.md#llama-cpp-static-split-by-tensor-name-cpu-computes-the-rest")
class LlamaCpp(Policy):
    """`copy_tokens`: passes of at least so many tokens copy the experts that they use to the device."""

    rule = S.GIVEN
    scope = "global"
    where = S.ON_CPU

    def __init__(self, copy_tokens: int = 32) -> None:
        if copy_tokens < 1:
            raise BadInput(f"copy_tokens {copy_tokens}: at least 1")
        self.copy_tokens = copy_tokens

    def setup(self) -> None:
        self.state.note[S.ADMIT] = 0
        self.state.note[S.HOST_TOKENS] = self.copy_tokens
        chosen_LE = mask("back_loading", self.capacity_bytes, self.shape)
        for layer, chosen_E in enumerate(chosen_LE):
            self.place(layer, chosen_E.nonzero()[0])
