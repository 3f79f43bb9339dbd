"""SkillNet: a fixed table says which skills a task switches on; they are averaged, and nothing is learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.task_rows import ids_of

NLU_TASKS = {
    "sentiment": (0, 3, 6), "nli": (0, 2, 6), "finance_similarity": (0, 2, 5, 6), "topic": (0, 6), "ner": (1, 6),
    "reading": (1, 2, 4, 6),
}  # fmt: skip
"""The paper's table for its seven skills, numbered from 0; skill 6 (general) is always on. Recalled, not re-checked."""


@register("routing", "skillnet", paper="2203.03312", card="routing.md#skillnet-nlu", needs={"task_ids"})
class SkillNet(Router):
    """y = mean over the skills of the token's task. `skills` lists each task's set of experts.

    A mean, because a sum would change the scale with the number of skills. By default every task has skill t of its own
    (as far as there are experts beside it) and the last, general, one. Modules outside the set get no gradient; an
    optimiser with weight decay still shrinks them unless it skips them. Decisions are the table's in both modes.
    """

    needs = frozenset({"task_ids"})

    def __init__(self, dim: int, experts: int, skills: Sequence[Sequence[int]] | None = None, tasks: int = 2):
        if skills is None:
            skills = [sorted({t % max(experts - 1, 1), experts - 1}) for t in range(tasks)]
        if not skills or any(not s for s in skills):
            raise BadInput(f"skills={skills}: every task needs at least one skill")
        for task, chosen in enumerate(skills):
            if len(set(chosen)) != len(chosen) or not all(0 <= e < experts for e in chosen):
                raise BadInput(f"skills of task {task} are {list(chosen)}: distinct numbers below experts={experts}")
        super().__init__(experts, max(len(s) for s in skills))
        table_AE = torch.zeros(len(skills), experts, dtype=torch.bool)
        for task, chosen in enumerate(skills):
            table_AE[task, list(chosen)] = True
        self.table_AE: Tensor
        self.register_buffer("table_AE", table_AE)

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        on_TE = self.table_AE[ids_of(ctx, "task_ids", len(self.table_AE), "skillnet")]
        order_TK = torch.sort((~on_TE).long(), dim=1, stable=True).indices[:, : self.k]
        on_TK = on_TE.gather(1, order_TK)
        share_T1 = 1.0 / on_TE.sum(1, keepdim=True).float()
        weights_TK = on_TK * share_T1
        chosen = on_TE.float()
        return empty_padding(Routing(chosen, chosen * share_T1, order_TK.masked_fill(~on_TK, -1), weights_TK), ctx)
