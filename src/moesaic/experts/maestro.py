"""Maestro's bank: low-rank experts whose leading ranks carry the most, and which can be cut at any rank."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.experts.bank import ExpertBank


class Factors(nn.Module):
    """W [out, in] = U V with rank r = min(in, out), from the SVD of a random W, sqrt(S) on each side."""

    def __init__(self, weight: Tensor):
        super().__init__()
        u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
        self.u_OR, self.v_RI = nn.Parameter(u * s.sqrt()), nn.Parameter(s.sqrt().unsqueeze(1) * v)
        self.used: int | None = None

    @property
    def rank(self) -> int:
        return self.u_OR.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        r = self.rank if self.used is None else self.used
        if (self.u_OR.shape[0] + self.v_RI.shape[1]) * r > self.u_OR.shape[0] * self.v_RI.shape[1]:
            return linear(x, self.u_OR[:, :r] @ self.v_RI[:r])
        return linear(linear(x, self.v_RI[:r]), self.u_OR[:, :r])

    def suffixes(self) -> tuple[Tensor, Tensor]:
        """||U[:, i:]||_F and ||V[i:]||_F for every i, [r] each; the eps keeps the root's gradient finite at zero."""
        return _suffix(self.u_OR.square().sum(0)), _suffix(self.v_RI.square().sum(1))

    def lasso(self) -> Tensor:
        """sum over i of both suffix norms: later ranks are in more of them, so they go first."""
        u_R, v_R = self.suffixes()
        return u_R.sum() + v_R.sum()

    @torch.no_grad()
    def shrink(self, threshold: float = 1e-5) -> int:
        """Cut ranks from the first whose importance (product of suffix norms) is below the threshold; the new rank.

        The parameters are replaced by smaller ones: an optimiser that holds the old ones must be built again.
        """
        u_R, v_R = (_suffix(part, 0.0) for part in (self.u_OR.float().square().sum(0), self.v_RI.float().square().sum(1)))
        keep = max(1, int((u_R * v_R >= threshold).sum()))
        if keep < self.rank:
            self.u_OR, self.v_RI = nn.Parameter(self.u_OR[:, :keep].clone()), nn.Parameter(self.v_RI[:keep].clone())
        return keep

    @contextmanager
    def truncated(self, rank: int) -> Iterator[None]:
        """Run with the first `rank` ranks only, inside the with block."""
        if not 1 <= rank <= self.rank:
            raise BadInput(f"rank={rank}: these factors have ranks 1 to {self.rank}")
        before, self.used = self.used, rank
        try:
            yield
        finally:
            self.used = before


def _suffix(squares_R: Tensor, eps: float = 1e-12) -> Tensor:
    return (squares_R.flip(0).cumsum(0).flip(0) + eps).sqrt()


@register("experts", "maestro", paper="2308.14929", card="layers-and-balancing.md#maestro")
class Maestro(ExpertBank):
    """y = W2 gelu(W1 x), every matrix a product of factors of its own rank; `cost_E` follows the ranks left.

    `factors()` lists all of them for a RankSampler, `lasso()` is the loss that orders and empties ranks, `shrink()` cuts
    what is empty, `dense(e)` is what to deploy where factors are larger than their product. Weight decay on factors
    works against the lasso: leave it out. Experts may end with unequal ranks, so they keep their parameters apart.
    """

    def __init__(self, dim: int, experts: int, width: int | None = None):
        super().__init__(dim, experts)
        width = dim if width is None else width
        self.first = nn.ModuleList(Factors(torch.randn(width, dim) * dim**-0.5) for _ in range(experts))
        self.second = nn.ModuleList(Factors(torch.randn(dim, width) * width**-0.5) for _ in range(experts))

    def factors(self) -> list[Factors]:
        return [*self.first, *self.second]

    def lasso(self) -> Tensor:
        return torch.stack([f.lasso() for f in self.factors()]).sum()

    def shrink(self, threshold: float = 1e-5) -> list[int]:
        """Cut empty ranks of all factors; the ranks left."""
        return [f.shrink(threshold) for f in self.factors()]

    def dense(self, e: int) -> dict[str, Tensor]:
        """Expert e's two matrices, multiplied out."""
        w = self[e]
        return {"in_ID": w["first_u_OR"] @ w["first_v_RI"], "out_DI": w["second_u_OR"] @ w["second_v_RI"]}

    @property
    def cost_E(self) -> Tensor:
        return torch.tensor([2.0 * sum(v.numel() for v in self.peek(e).values()) for e in range(self.num_experts)])

    def forward(self, x_SD: Tensor, offsets_E1: Tensor) -> Tensor:
        spans = itertools.pairwise(offsets_E1.tolist())
        parts = [self.second[e](gelu(self.first[e](x_SD[s:t]))) for e, (s, t) in enumerate(spans) if s < t]
        return torch.cat(parts) if parts else x_SD.new_zeros(0, self.dim)

    def peek(self, e: int) -> dict[str, Tensor]:
        self._check(e)
        pairs = (("first", self.first[e]), ("second", self.second[e]))
        return {f"{where}_{name}": p for where, f in pairs for name, p in f.named_parameters()}


class RankSampler:
    """Draws one (factors, rank) per step from all pairs without replacement; a new shuffle begins when all were drawn."""

    def __init__(self, factors: list[Factors], seed: int = 0):
        self.factors, self.random = factors, random.Random(seed)
        self.left: list[tuple[Factors, int]] = []

    @classmethod
    def of(cls, model: nn.Module, seed: int = 0) -> RankSampler:
        """Over all factors of a model. Raises BadInput when it has none. Build it again after shrinking."""
        found = [m for m in model.modules() if isinstance(m, Factors)]
        if not found:
            raise BadInput("this model has no low-rank factors: give its layers the 'maestro' bank")
        return cls(found, seed)

    def draw(self) -> tuple[Factors, int]:
        if not self.left:
            self.left = [(f, rank) for f in self.factors for rank in range(1, f.rank + 1)]
            self.random.shuffle(self.left)
        return self.left.pop()

    @contextmanager
    def step(self) -> Iterator[tuple[Factors, int]]:
        """Ordered dropout of one step: inside, one drawn layer runs with its first ranks only."""
        factors, rank = self.draw()
        with factors.truncated(rank):
            yield factors, rank
