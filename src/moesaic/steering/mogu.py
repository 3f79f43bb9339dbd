"""MoGU: the first tokens of an answer come from a mixture of a safe and a usable variant of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.steering.kept import kept
from moesaic.steering.mogu_adapter import MoguAdapter
from moesaic.steering.steer import Steer
from moesaic.view.course import Course, ready


@register(
    "steering", "mogu", paper="2405.14488", exact=False,
    card="surgery-and-steering.md#mogu-usable-and-safe-variants-with-dynamic-weights",
)  # fmt: skip
class Mogu(Steer):
    """The first `tokens` tokens are drawn with the adapter attached, the rest from the model as it is, which reads the text so
    far again: its logits are then the model's own for that prefix (the card leaves open whether the cache is kept). Works
    on any model with linear layers named o_proj, dense ones too.

    `adapter`: a file of `MoguAdapter.write` (steering/mogu_adapter.py trains it). Its hooks hold for a whole call.
    """

    files: ClassVar[frozenset[str]] = frozenset({"adapter"})
    alone = "a MoGU adapter holds for a whole call"

    def __init__(self, adapter: str | MoguAdapter, tokens: int = 5) -> None:
        if tokens < 1:
            raise BadInput(f"mogu: tokens {tokens}: at least 1")
        self.adapter = adapter if isinstance(adapter, MoguAdapter) else kept(MoguAdapter.read, adapter)
        self.tokens = tokens

    def check(self) -> None:
        self.adapter.check(self.model)

    def start(self, prompt_ids: Sequence[int]) -> Course:
        return Course(around=lambda: self.adapter.attached(self.model), tokens=self.tokens, then=lambda ids: ready(Course()))
