"""M3ViT: a gate for every task, or one gate that is told the task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.select import top_k


@register("routing", "m3vit", paper="2210.14793", card="routing.md#m3vit", needs={"task_ids"})
class M3ViT(Router):
    """l = z W^T; in training + N(0, (noise_std / E)^2); softmax over all E, top-k, not renormalised.

    "multi_gate": z is the token, W the gate of its task. "conditioned": one W over [token ; MLP(one-hot task)], the MLP
    Linear-GELU-Linear-LayerNorm with `task_width` outputs (a bare one-hot barely moves the softmax). `ranges` gives each
    task a range (first, end) of experts, the rest -inf; `prune` leaves out experts that weigh less. The losses
    are `importance` and `smooth_load`, over the tokens of all tasks: over one task they would make it use every expert.
    """

    needs = frozenset({"task_ids"})

    def __init__(
        self,
        dim: int,
        experts: int,
        k: int = 4,
        tasks: int = 2,
        gate: Literal["multi_gate", "conditioned"] = "multi_gate",
        task_width: int = 16,
        noise_std: float = 1.0,
        ranges: Sequence[tuple[int, int]] | None = None,
        prune: float = 0.0,
    ):
        super().__init__(experts, k)
        if gate not in ("multi_gate", "conditioned") or tasks < 1:
            raise BadInput(f"gate={gate!r}, tasks={tasks}: multi_gate or conditioned, for at least one task")
        if ranges is not None and len(ranges) != tasks:
            raise BadInput(f"ranges has {len(ranges)} entries for {tasks} tasks")
        for first, end in ranges or ():
            if not 0 <= first < end <= experts or end - first < k:
                raise BadInput(f"ranges: ({first}, {end}) holds no k={k} of {experts} experts")
        self.tasks, self.gate, self.noise_std, self.prune = tasks, gate, noise_std, prune
        copies, width = (tasks, dim) if gate == "multi_gate" else (1, dim + task_width)
        self.weight = nn.Parameter(torch.empty(copies, experts, width).normal_(std=0.02))
        self.task = None
        if gate == "conditioned":
            parts = (nn.Linear(tasks, task_width), nn.GELU(), nn.Linear(task_width, task_width), nn.LayerNorm(task_width))
            self.task = nn.Sequential(*parts)
        self.open_AE: Tensor
        open_AE = torch.ones(tasks, experts, dtype=torch.bool)
        for task, (first, end) in enumerate(ranges or ()):
            open_AE[task] = (torch.arange(experts) >= first) & (torch.arange(experts) < end)
        self.register_buffer("open_AE", open_AE)

    def flops_per_token(self, length: int = 1) -> float:
        """One gate per token. The task MLP runs once per call."""
        return 2.0 * self.weight[0].numel()

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        task_T = ctx.need("task_ids", "m3vit")
        if task_T.numel() and not 0 <= int(task_T.min()) <= int(task_T.max()) < self.tasks:
            raise BadInput(f"task ids {int(task_T.min())} to {int(task_T.max())}: this router knows 0 to {self.tasks - 1}")
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self._score(x_TD.float(), task_T)
        aux = {}
        if ctx.training and self.noise_std:
            noise_TE = torch.randn(logits_TE.shape, generator=ctx.generator, device=logits_TE.device)
            logits_TE = logits_TE + noise_TE * self.noise_std / self.num_experts
            aux["noise_scale"] = torch.tensor(self.noise_std / self.num_experts, device=logits_TE.device)
        logits_TE = logits_TE.masked_fill(~self.open_AE[task_T], float("-inf"))
        probs_TE = logits_TE.softmax(-1)
        experts_TK = top_k(logits_TE, self.k)
        weights_TK = probs_TE.gather(1, experts_TK)
        if self.prune:
            low_TK = weights_TK.detach() < self.prune
            experts_TK, weights_TK = experts_TK.masked_fill(low_TK, -1), weights_TK.masked_fill(low_TK, 0.0)
        return empty_padding(Routing(logits_TE, probs_TE, experts_TK, weights_TK, aux=aux), ctx)

    def _score(self, x_TD: Tensor, task_T: Tensor) -> Tensor:
        if self.task is not None:
            one_hot_AA = torch.eye(self.tasks, device=x_TD.device, dtype=self.weight.dtype)
            return linear(torch.cat([x_TD, self.task(one_hot_AA).float()[task_T]], 1), self.weight[0].float())
        logits_TE = x_TD.new_zeros(x_TD.shape[0], self.num_experts)
        for task in task_T.unique().tolist():
            index_t = torch.nonzero(task_T == task).flatten()
            logits_TE = logits_TE.index_copy(0, index_t, linear(x_TD[index_t], self.weight[task].float()))
        return logits_TE
