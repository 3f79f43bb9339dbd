"""Recovery training: the task's loss and a softened mimicry of the model as it was before surgery.

Shape legend: B batch, N tokens of a row, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moesaic.core.errors import BadInput, NotMoE
from moesaic.surgery.objective import Batch, Given, Objective, token_logits
from moesaic.view.block import View

TRAINS = ("all", "moe", "experts")


def softened_kl(student_BNV: Tensor, teacher_BNV: Tensor, temperature: float) -> Tensor:
    """Mean over positions of KL(teacher || student), nats, both distributions softened by `temperature`; 0 where they agree.

    Not multiplied by the square of the temperature. Vocabularies of different widths are cut to the common one.
    """
    width = min(student_BNV.shape[-1], teacher_BNV.shape[-1])
    teacher_BNV = (teacher_BNV[..., :width].float() / temperature).log_softmax(-1)
    student_BNV = (student_BNV[..., :width].float() / temperature).log_softmax(-1)
    return (teacher_BNV.exp() * (teacher_BNV - student_BNV)).sum(-1).mean()


class Recovery(Objective):
    """task * CE + kd * KL to a teacher: the one that is given, or else the model as it comes in.

    `train`: "all" parameters, those of MoE blocks ("moe": experts, routers, shared experts), or those of "experts" alone.
    """

    takes_reshaped: ClassVar[bool] = True

    def __init__(self, kd: float = 0.2, temperature: float = 2.0, task: float = 1.0, train: str = "all") -> None:
        if min(kd, task) < 0 or kd + task == 0 or temperature <= 0:
            raise BadInput(f"kd={kd}, task={task}, temperature={temperature}: weights not negative, one above 0; a temperature")
        if train not in TRAINS:
            raise BadInput(f"train={train!r}: one of {', '.join(TRAINS)}")
        self.kd, self.temperature, self.task, self.train = kd, temperature, task, train
        self.teacher: Any = None
        self.seen: list[tuple[float, float]] = []

    def plan(self, model: Any) -> dict[str, Any]:
        what = {"all": "the whole model", "moe": "MoE blocks", "experts": "experts"}[self.train]
        stock = getattr(model.config, "surgery", None) is None
        reason = "the architecture stays" if stock else "it needed `import moesaic` before"
        return {"stock": stock, "reason": reason, "trains": f"{what}, on CE and KL to the model before surgery"}

    def prepare(self, model: Any, given: Given) -> list[nn.Parameter]:
        self.teacher = given.teacher
        if self.kd and self.teacher is None:
            self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        return self.learning(model)

    def learning(self, model: Any) -> list[nn.Parameter]:
        """The parameters that learn, each once. Raises BadInput where there are no experts."""
        if self.train == "all":
            return [p for p in model.parameters() if p.numel() and p.is_floating_point()]
        try:
            owners = [block.experts if self.train == "experts" else block.parent for block in View(model)]
        except NotMoE as error:
            raise BadInput(f"train={self.train}: {error}") from error
        found = {id(p): p for owner in owners for p in owner.parameters() if p.numel() and p.is_floating_point()}
        return list(found.values())

    def loss(self, model: Any, batch: Batch) -> Tensor:
        ids_BN = batch["text"]
        student_BNV = token_logits(model, ids_BN)
        total = student_BNV.new_zeros(())
        task = nn.functional.cross_entropy(student_BNV.flatten(0, 1), ids_BN[:, 1:].flatten())
        total = total + self.task * task
        if self.kd:
            with torch.no_grad():
                teacher_BNV = token_logits(self.teacher, ids_BN)
            far = softened_kl(student_BNV, teacher_BNV, self.temperature)
            total = total + self.kd * far
            self.seen.append((float(task.detach()), float(far.detach())))
        return total

    def facts(self) -> dict[str, Any]:
        if not self.seen:
            return {}
        (task, far), (task_last, far_last) = self.seen[0], self.seen[-1]
        return {"task_first": task, "task_last": task_last, "kl_first": far, "kl_last": far_last}
