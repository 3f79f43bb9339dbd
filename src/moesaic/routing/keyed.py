"""Monet's router: gates over two sides of keys, kept by a threshold on batch-normalised logits."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.recompute import recomputing
from moesaic.core.routing import Routing
from moesaic.routing.router import Router


class KeyedRouter(Router):
    """l [T, 2, H, n] = W x; z = l normalised with one mean and variance per side and head, pooled over tokens and keys;
    kept: z >= min(PhiInverse(1 - k / n), max z); gates = softmax of the RAW l over the kept keys, 0 elsewhere.

    About k keys stay per head when the logits are Gaussian, at least one always; no top-k. Training uses the statistics
    of the batch (of all processes, padding left out) and moves the running ones, which evaluation uses and checkpoints
    hold. The threshold takes no gradient, so they need none. Only in training does a token's threshold see others.
    """

    keyed: ClassVar[bool] = True
    bank = "monet"

    def __init__(self, dim: int, keys: int, heads: int = 8, k: int | None = None, momentum: float = 0.1, eps: float = 1e-5):
        k = max(1, keys // 16) if k is None else k
        if not 0 < k <= keys:
            raise BadInput(f"k={k}: between 1 and the {keys} keys of a side")
        super().__init__(keys * keys, k)
        self.keys, self.heads, self.momentum, self.eps = keys, heads, momentum, eps
        self.weight_2HND = nn.Parameter(torch.empty(2, heads, keys, dim).normal_(std=0.02))
        self.mean_2H: Tensor
        self.var_2H: Tensor
        self.register_buffer("mean_2H", torch.zeros(2, heads))
        self.register_buffer("var_2H", torch.ones(2, heads))

    @property
    def threshold(self) -> float:
        return float(torch.special.ndtri(torch.tensor(1 - self.k / self.keys, dtype=torch.float64)))

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            flat_TR = linear(x_TD.float(), self.weight_2HND.float().flatten(0, 2))
        logits_T2HN = flat_TR.view(-1, *self.weight_2HND.shape[:3])
        keep_T2HN = self._keep(logits_T2HN.detach(), ctx)
        gates_T2HN = logits_T2HN.masked_fill(~keep_T2HN, float("-inf")).softmax(-1)
        if ctx.mask is not None:
            gates_T2HN = gates_T2HN * ctx.mask.view(-1, 1, 1, 1)
        probs_TR = logits_T2HN.softmax(-1).flatten(1) / (2 * self.heads)
        return Routing(flat_TR, probs_TR, keyed_T2HN=gates_T2HN)

    @torch.no_grad()
    def _keep(self, logits_T2HN: Tensor, ctx: RoutingContext) -> Tensor:
        mean_2H, var_2H = self.mean_2H.float(), self.var_2H.float()
        if ctx.training and len(logits_T2HN):
            mean_2H, var_2H = self._batch(logits_T2HN if ctx.mask is None else logits_T2HN[ctx.mask])
        z_T2HN = (logits_T2HN - mean_2H.unsqueeze(-1)) * (var_2H.unsqueeze(-1) + self.eps).rsqrt()
        return z_T2HN >= z_T2HN.amax(-1, keepdim=True).clamp(max=self.threshold)

    def _batch(self, logits_T2HN: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of this batch, over all processes; the running ones move once per step's forward."""
        again = recomputing()
        count = torch.tensor(float(logits_T2HN.shape[0] * self.keys), device=logits_T2HN.device)
        total_2H, square_2H = logits_T2HN.sum((0, 3)), logits_T2HN.square().sum((0, 3))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            packed = torch.cat([total_2H.flatten(), square_2H.flatten(), count.view(1)])
            torch.distributed.all_reduce(packed)
            (total_2H, square_2H), count = packed[:-1].view(2, 2, -1), packed[-1]
        mean_2H = total_2H / count.clamp(min=1)
        var_2H = (square_2H / count.clamp(min=1) - mean_2H.square()).clamp(min=0)
        if not again and count > 0:
            unbiased_2H = var_2H * count / (count - 1).clamp(min=1)
            self.mean_2H.lerp_(mean_2H.to(self.mean_2H.dtype), self.momentum)
            self.var_2H.lerp_(unbiased_2H.to(self.var_2H.dtype), self.momentum)
        return mean_2H, var_2H
