"""LLaVA-MoD on text: a student mimics its teacher, becomes a MoE, mimics again, and may then learn preferences."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.distillation import PREFERENCES, mimic_loss, read_answers, read_preferences, response_log_probs
from moesaic.surgery.objective import Batch, Given, Objective, Stage
from moesaic.surgery.stock import moe_config
from moesaic.surgery.upcycle.sparse import sparse
from moesaic.view import discover
from moesaic.view.block import View


class Mimic(Objective):
    """KD of the teacher's distribution, with the language model's own loss and a load loss where asked for."""

    def __init__(
        self,
        lm: float = 0.0,
        aux: float = 0.0,
        train: str = "all",
        upcycle: dict[str, int] | None = None,
        answers: bool = False,
    ) -> None:
        self.lm, self.aux, self.train, self.upcycle = lm, aux, train, upcycle
        self.texts = ("answers",) if answers else ("text",)

    def convert(self, model: Any, given: Given) -> Any:
        return model if self.upcycle is None else sparse(model, seed=given.seed, **self.upcycle)

    def prepare(self, model: Any, given: Given) -> list[nn.Parameter]:
        self.teacher = given.teacher
        if self.train == "all":
            return list(model.parameters())
        return [p for block in View(model) for p in block.parent.parameters()]

    def loss(self, model: Any, batch: Batch) -> Tensor:
        if self.texts == ("text",):
            ids_BN = labels_BN = batch["text"]
        else:
            ids_BN, labels_BN = batch["answers/ids"], batch["answers/labels"]
        with torch.no_grad():
            teacher_BNV = self.teacher(input_ids=ids_BN, use_cache=False).logits
        asked: dict[str, Any] = {"output_router_logits": True} if self.aux else {}
        output = model(input_ids=ids_BN, use_cache=False, **asked)
        total = mimic_loss(output.logits, teacher_BNV, labels_BN)
        if self.lm:
            logits_TV = output.logits[:, :-1].float().flatten(0, 1)
            total = total + self.lm * nn.functional.cross_entropy(logits_TV, labels_BN[:, 1:].flatten())
        if self.aux:
            total = total + self.aux * output.aux_loss
        return total


class Prefer(Objective):
    """Preferences with the teacher as reference, in evaluation mode."""

    texts = ("preferences",)

    def __init__(self, kind: str, beta: float) -> None:
        self.of, self.beta = PREFERENCES[kind], beta

    def prepare(self, model: Any, given: Given) -> list[nn.Parameter]:
        self.teacher = given.teacher
        return list(model.parameters())

    def loss(self, model: Any, batch: Batch) -> Tensor:
        ratios = []
        for side in ("chosen", "rejected"):
            ids_BN, labels_BN = batch[f"preferences/{side}_ids"], batch[f"preferences/{side}_labels"]
            with torch.no_grad():
                reference_B = response_log_probs(self.teacher, ids_BN, labels_BN)
            ratios.append(response_log_probs(model, ids_BN, labels_BN) - reference_B)
        return self.of(ratios[0], ratios[1], self.beta)


@register("distill", "llava_mod", paper="2408.15881", card="surgery-and-steering.md#llava-mod", exact=False)
class LLaVAMoD(Objective):
    """Stages: dense mimics (KD); its FFNs become `experts` copies, top-`k`, in every `every`-th layer; the MoE mimics (FFN
    and router learn, KD + `lm` * LM + `aux` * load loss); then preferences, where `preference` names a loss.

    The paper's text says that the second stage is KD alone, its script adds the LM loss: the default is the script's. The
    released mask is not shifted by one position; here a position counts where it predicts a response token. No capacity:
    drops would break that the MoE starts as the dense student. The first stage on captions has no part here. A student
    that is a MoE already starts at the second mimic. `preference` is kto_pair or dpo, needs a text "preferences" of
    {prompt, chosen, rejected} lines, and runs at a tenth of the rate.

    Shares of the steps follow the paper's samples (2.4 M, 1.4 M, 80 k).
    """

    readers: ClassVar[Any] = {"preferences": read_preferences, "answers": read_answers}

    def __init__(
        self,
        experts: int = 4,
        k: int = 2,
        every: int = 2,
        aux: float = 0.01,
        lm: float = 1.0,
        dense_share: float = 0.62,
        answers: bool = False,
        preference: str | None = None,
        preference_share: float = 0.02,
        beta: float = 0.1,
    ) -> None:
        if preference is not None and preference not in PREFERENCES:
            raise BadInput(f"preference={preference!r}: one of {', '.join(PREFERENCES)}")
        if not 0 <= dense_share < 1 or not 0 <= preference_share < 1 or dense_share + preference_share >= 1:
            raise BadInput(
                f"dense_share={dense_share}, preference_share={preference_share}: shares that leave some for the MoE"
            )
        if min(aux, lm) < 0 or beta <= 0:
            raise BadInput(f"aux={aux}, lm={lm}, beta={beta}: not negative, and a positive beta")
        self.upcycle = {"experts": experts, "k": k, "every": every}
        self.aux, self.lm, self.dense_share, self.beta = aux, lm, dense_share, beta
        self.preference, self.preference_share = preference, preference_share if preference else 0.0
        self.answers, self.dense = answers, True

    def plan(self, model: Any) -> dict[str, Any]:
        self.dense = not any(discover.is_experts(module) for module in model.modules())
        stages = "the whole student, then FFNs and routers" if self.dense else "FFNs and routers"
        facts = {"stock": True, "reason": "the student is a stock architecture", "trains": stages}
        if self.dense:
            config = moe_config(model.config, self.upcycle["experts"], self.upcycle["k"], every=self.upcycle["every"])
            facts["student"] = f"{model.config.model_type} -> {config.model_type}"
        return facts

    def stages(self) -> list[Stage]:
        found = []
        dense_share = self.dense_share if self.dense else 0.0
        if self.dense:
            found.append(Stage("dense mimic", Mimic(answers=self.answers), dense_share))
        sparse_mimic = Mimic(self.lm, self.aux, "moe", self.upcycle if self.dense else None, self.answers)
        found.append(Stage("sparse mimic", sparse_mimic, 1 - dense_share - self.preference_share))
        if self.preference:
            found.append(Stage(self.preference, Prefer(self.preference, self.beta), self.preference_share, lr=0.1))
        return found
