"""The SDM network: an answer is written unit by unit, each verified before the next, drawn again or given up where it fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.steering.kept import kept
from moesaic.steering.sdm import read_store
from moesaic.steering.sdm_head import NAMES, RIGHT, Head, unit_features
from moesaic.steering.steer import Steer
from moesaic.view.course import Course, Steps, ready


@register(
    "steering", "sdm_network", paper="2502.20167", exact=False,
    card="surgery-and-steering.md#similarity-distance-magnitude-sdm-activation-calibration-and-admission",
)  # fmt: skip
class SdmNetwork(Steer):
    """Tokens are drawn from z_pos, the model's own logits, with the negative half of the head masked. After every `unit`
    tokens, and at the answer's end, the verification layer judges the unit. Decoding goes on where it says right and its lower
    estimate of the probability reaches the admission threshold; else the unit is taken back and drawn again, up to `redraws`
    times (greedy decoding draws the same), and then the answer ends before it.

    `store`, `head`: files of `moesaic steer sdm-network`. Two logit vectors, the SDM loss on both and branching on p_lower are
    the card's. `[inferred]`: the model and z_pos stay frozen and z_neg alone is learnt (steering/sdm_head.py); a unit is a
    number of tokens; the verification layer reads the last hidden state and the unit's mean log odds of z_pos against z_neg; a
    branch is another draw.
    """

    files: ClassVar[frozenset[str]] = frozenset({"store", "head"})
    alone = "each unit of an SDM network is verified before the next"
    rewrites = "sdm_network takes text back"

    def __init__(self, store: str, head: str, unit: int = 16, redraws: int = 0) -> None:
        if unit < 1 or redraws < 0:
            raise BadInput(f"sdm_network: unit {unit} is at least 1, redraws {redraws} at least 0")
        self.rule, names = kept(read_store, store)
        self.head = kept(Head.read, head)
        if tuple(names) != NAMES:
            raise BadInput(
                f"{store}: a store of the classes {', '.join(names)}: `moesaic steer sdm-network` writes one of units"
            )
        self.unit, self.redraws = unit, redraws

    def check(self) -> None:
        self.head.check(self.model)
        if self.rule.fitted.net.adapt.in_features != len(self.head.shift_F):
            raise BadInput("sdm_network: the store and the head are not of one training: make both again")

    def start(self, prompt_ids: Sequence[int]) -> Course:
        return self._go(len(prompt_ids), 0, {"units": 0, "redrawn": 0})

    def _go(self, at: int, tries: int, note: dict[str, Any], back: int = 0) -> Course:
        """On from position `at`, where a unit begins for the (tries + 1)-th time."""
        return Course(
            tokens=self.unit, then=lambda ids: self._judged(ids, at, tries, note), checks=True, back=back,
            notes={"sdm_network": note},
        )  # fmt: skip

    def _judged(self, ids: list[int], at: int, tries: int, note: dict[str, Any]) -> Steps[Course]:
        count = len(ids) - at
        with torch.inference_mode(False), torch.no_grad():
            verdict = self.rule.judge(unit_features(self.model, self.head, ids[:at], ids[at:])[None])
        right = bool(verdict.admitted_m[0]) and int(verdict.predicted_m[0]) == RIGHT
        note = {**note, "class": NAMES[int(verdict.predicted_m[0])], "probability_lower": float(verdict.p_lower_m[0])}
        if right:
            return ready(self._go(len(ids), 0, {**note, "units": note["units"] + 1}))
        if tries < self.redraws:
            return ready(self._go(at, tries + 1, {**note, "redrawn": note["redrawn"] + 1}, back=count))
        told = f"after {note['units']} verified units the next was not ({note['class']}, p {note['probability_lower']:.2f})"
        return ready(Course(back=count, refused=told, notes={"sdm_network": note}))
