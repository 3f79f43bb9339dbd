"""Hecto: one kind of expert disabled or forced for every input, to see what it is for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.layers.hecto import Hecto
from moesaic.steering.steer import Steer
from moesaic.view.course import Course


@register(
    "steering", "hecto_mask", paper="2506.22919", card="surgery-and-steering.md#hecto-heterogeneous-experts-masked-to-explain",
    exact=False, causal=False,
)  # fmt: skip
class HectoMask(Steer):
    """`do="off"`: expert `expert` of every Hecto layer is never chosen; "force": it alone is, for every sequence.

    The gate's logits of the others are what they were, so what is off leaves its inputs to the next best. `by_class` reports
    what each expert means to each class. The mask holds for a whole call.
    """

    alone = "a Hecto mask holds for a whole call"

    def __init__(self, expert: int, do: Literal["off", "force"] = "off") -> None:
        if do not in ("off", "force") or isinstance(expert, bool) or not isinstance(expert, int) or expert < 0:
            raise BadInput(f"hecto_mask: expert {expert!r} is an expert's number, do {do!r} is off or force")
        self.expert, self.do = expert, do

    def check(self) -> None:
        check(self.model, self.expert, self.do)

    def start(self, prompt_ids: Sequence[int]) -> Course:
        return Course(around=lambda: masking(self.model, self.expert, self.do))


def check(model: nn.Module, expert: int, do: str) -> list[Hecto]:
    """The Hecto layers. Raises BadInput where there is none, or no such expert, or nothing would be left."""
    found = [module for module in model.modules() if isinstance(module, Hecto)]
    if not found:
        raise BadInput("hecto_mask: this model has no Hecto layer; mote masks experts of other models")
    for layer in found:
        count = len(layer.experts)
        if expert >= count or (do == "off" and count == 1):
            raise BadInput(f"hecto_mask: cannot switch expert {expert} {do}: the layer has {count}")
    return found


@contextmanager
def masking(model: nn.Module, expert: int, do: str = "off") -> Iterator[None]:
    """Inside the block every Hecto layer of the model, called in this thread, chooses without the expert, or the expert
    alone."""

    own = threading.get_ident()

    def mask(module: nn.Module, args: tuple, logits_BE: Tensor) -> Tensor | None:
        if threading.get_ident() != own:
            return None
        here_E = torch.arange(logits_BE.shape[-1], device=logits_BE.device) == expert
        return logits_BE.masked_fill(here_E if do == "off" else ~here_E, float("-inf"))

    handles = [layer.gate.register_forward_hook(mask) for layer in check(model, expert, do)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_class(model: nn.Module, predict: Callable[[], Tensor], labels_B: Tensor) -> dict[str, dict[int, float]]:
    """Accuracy per class as the model is ("all"), and with each expert off ("without 0", ...): what masking explains."""
    count = min(len(layer.experts) for layer in check(model, 0, "off"))
    found = {"all": _accuracy(predict(), labels_B)}
    for expert in range(count):
        with masking(model, expert):
            found[f"without {expert}"] = _accuracy(predict(), labels_B)
    return found


def _accuracy(predicted_B: Tensor, labels_B: Tensor) -> dict[int, float]:
    return {int(c): float((predicted_B[labels_B == c] == c).float().mean()) for c in labels_B.unique()}
