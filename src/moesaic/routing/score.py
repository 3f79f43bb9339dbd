"""Scores: x [T, D] -> logits [T, E], float32."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from moesaic.core.context import RoutingContext


class LinearScore(nn.Module):
    """l = x W^T in float32, no bias, W ~ N(0, std^2); `jitter` multiplies x by U(1 - jitter, 1 + jitter) in training."""

    def __init__(self, dim: int, experts: int, std: float = 0.02, jitter: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, dim).normal_(std=std))
        self.jitter = jitter

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Tensor:
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.float()
            if self.jitter and ctx.training:
                x_TD = x_TD * (1 + self.jitter * (2 * _rand(x_TD, ctx) - 1))
            return linear(x_TD, self.weight.float())


class NoisyScore(nn.Module):
    """Training noise on another score. "shazeer": + eps * softplus(x W_noise), W_noise starts at 0 (and so should W);
    "vmoe": + N(0, (std / E)^2). Evaluation adds nothing. Card: routing.md, "Top-k softmax gating" 3."""

    def __init__(self, score: LinearScore, kind: Literal["shazeer", "vmoe"], std: float = 1.0):
        super().__init__()
        self.score, self.kind, self.std = score, kind, std
        if kind == "shazeer":
            nn.init.zeros_(score.weight)
            self.noise_weight = nn.Parameter(torch.zeros_like(score.weight))

    def scale(self, x_TD: Tensor) -> Tensor | float:
        """Standard deviation of the noise, [T, E] or one number."""
        if self.kind == "shazeer":
            return softplus(linear(x_TD.float(), self.noise_weight.float()))
        return self.std / self.score.weight.shape[0]

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Tensor:
        logits_TE = self.score(x_TD, ctx)
        if not ctx.training:
            return logits_TE
        noise_TE = torch.randn(logits_TE.shape, generator=ctx.generator, device=logits_TE.device)
        return logits_TE + noise_TE * self.scale(x_TD)


def _rand(x: Tensor, ctx: RoutingContext) -> Tensor:
    return torch.rand(x.shape, generator=ctx.generator, device=x.device)
