"""Task-level MoE: a task's vector picks its expert, the same for all of its tokens."""

from __future__ import annotations

from math import exp
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.score import LinearScore
from moesaic.routing.task_rows import ids_of


@register("routing", "task_level", paper="2205.12701", card="routing.md#task-level-moe", needs={"task_ids", "step"})
class TaskLevel(Router):
    """logits = Linear(64, E) GELU Linear(d, 64) of a table of task vectors [tasks, d]; nothing of the token.

    Training runs all experts with d = softmax(l / tau) ("softmax"), its Gumbel version ("gumbel"), or that rounded to
    one expert with the soft gradient ("straight_through", the default): drawn once per task and forward, so that all
    tokens of a task share the draw. tau = max(tau0 exp(-rate * step), tau_min). Evaluation runs the arg-max expert with
    weight 1. The paper's experts are copies of whole transformer layers; here they are those of any bank.
    """

    needs = frozenset({"task_ids", "step"})

    def __init__(
        self,
        dim: int,
        experts: int,
        tasks: int = 2,
        vector: int = 768,
        mode: Literal["softmax", "gumbel", "straight_through"] = "straight_through",
        tau: float = 2.0,
        rate: float = 3e-4,
        tau_min: float = 0.1,
    ):
        super().__init__(experts, experts)
        if mode not in ("softmax", "gumbel", "straight_through") or tau <= 0 or tau_min <= 0 or tasks < 1:
            raise BadInput(f"mode={mode!r}, tau={tau}, tau_min={tau_min}, tasks={tasks}: see the class for what they may be")
        self.mode, self.tau, self.rate, self.tau_min = mode, tau, rate, tau_min
        self.vector_AC = nn.Parameter(torch.randn(tasks, vector) * 0.02)
        self.first, self.last = LinearScore(vector, 64, std=vector**-0.5), LinearScore(64, experts, std=64**-0.5)

    def flops_per_token(self, length: int = 1) -> float:
        """Nothing: tokens look their task up."""
        return 0.0

    @property
    def fixed_flops(self) -> float:
        return 2.0 * len(self.vector_AC) * (self.first.weight.numel() + self.last.weight.numel())

    def temperature(self, step: int) -> float:
        return max(self.tau * exp(-self.rate * step), self.tau_min)

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        task_T = ids_of(ctx, "task_ids", len(self.vector_AC), "task_level")
        logits_AE = self.last(gelu(self.first(self.vector_AC, ctx)), ctx)
        if not ctx.training:
            best_T1 = logits_AE.argmax(-1)[task_T].unsqueeze(1)
            routing = Routing(
                logits_AE[task_T], logits_AE.softmax(-1)[task_T], best_T1, torch.ones_like(best_T1, dtype=torch.float32)
            )
            return empty_padding(routing, ctx)
        weights_TE = self._mix(logits_AE, ctx)[task_T]
        all_TE = torch.arange(self.num_experts, device=x_TD.device).expand(len(task_T), -1)
        return empty_padding(Routing(logits_AE[task_T], logits_AE.softmax(-1)[task_T], all_TE, weights_TE), ctx)

    def _mix(self, logits_AE: Tensor, ctx: RoutingContext) -> Tensor:
        if self.mode != "softmax":
            noise_AE = torch.rand(logits_AE.shape, generator=ctx.generator, device=logits_AE.device)
            logits_AE = logits_AE - (-noise_AE.clamp(min=1e-20).log()).clamp(min=1e-20).log()
        soft_AE = (logits_AE / self.temperature(ctx.need("step", "task_level"))).softmax(-1)
        if self.mode != "straight_through":
            return soft_AE
        hard_AE = torch.zeros_like(soft_AE).scatter(1, soft_AE.argmax(-1, keepdim=True), 1.0)
        return hard_AE + soft_AE - soft_AE.detach()
