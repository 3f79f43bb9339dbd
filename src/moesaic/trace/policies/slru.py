"""SLRU: what is used a second time is protected from what is used once, so that a prompt does not flush the cache.

Card serving-and-scale.md, "Consequences for the design": LRU or SLRU per layer is the default to beat.
"""

from __future__ import annotations

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.trace.policies import state as S
from moesaic.trace.policies.policy import Policy, Scope


@register("policies", "slru", card="serving-and-scale.md#consequences-for-the-design")
class SLRU(Policy):
    """`protected`: share of the capacity for what was used twice. `bypass_tokens`: see lru."""

    rule = S.SEGMENTS

    def __init__(self, scope: Scope = "layer", protected: float = 0.8, bypass_tokens: int = 0) -> None:
        if not 0 <= protected <= 1:
            raise BadInput(f"protected {protected}: a share between 0 and 1")
        self.scope, self.protected, self.bypass_tokens = scope, protected, bypass_tokens

    def setup(self) -> None:
        self.state.number[S.SHARE] = self.protected
