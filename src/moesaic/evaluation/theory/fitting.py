"""Gaussian mixtures of experts over one input, in float64: density, sampling, maximum likelihood, and rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Parameters = dict[str, Tensor]


def log_density(y_N: Tensor, x_N: Tensor, log_gate_NE: Tensor, p: Parameters) -> Tensor:
    """log sum_i pi_i(x) N(y; a_i x + c_i, exp(log_s_i)^2), [N]."""
    mean_NE = x_N.unsqueeze(1) * p["a"] + p["c"]
    z_NE = (y_N.unsqueeze(1) - mean_NE) / p["log_s"].exp()
    return (log_gate_NE - 0.5 * z_NE.square() - p["log_s"] - 0.5 * math.log(2 * math.pi)).logsumexp(1)


def sample(
    n: int, gate: Callable[[Tensor, Parameters], Tensor], p: Parameters, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(x, y): x uniform on [-1, 1], y from the mixture."""
    x_N = 2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1
    chosen_N1 = torch.multinomial(gate(x_N, p).exp(), 1, generator=generator)
    mean_N = (x_N.unsqueeze(1) * p["a"] + p["c"]).gather(1, chosen_N1)[:, 0]
    scale_N = p["log_s"].exp().expand(n, -1).gather(1, chosen_N1)[:, 0]
    return x_N, mean_N + scale_N * torch.randn(n, generator=generator, dtype=torch.float64)


def fit(loss: Callable[[Parameters], Tensor], start: Parameters, iterations: int = 80) -> Parameters:
    """Minimise by L-BFGS with a line search, from `start`."""
    found = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.LBFGS(
        found.values(), max_iter=iterations, line_search_fn="strong_wolfe", tolerance_grad=1e-9, tolerance_change=1e-12
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(found)
        value.backward()
        return value

    optimizer.step(closure)
    return {name: value.detach() for name, value in found.items()}


def near(p: Parameters, generator: torch.Generator, off: float = 0.15) -> Parameters:
    """The parameters with every number off by a share of itself, about `off`."""
    return {
        name: value * (1 + off * torch.randn(value.shape, generator=generator, dtype=value.dtype)) for name, value in p.items()
    }


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of log y over log x."""
    lx, ly = (torch.tensor(v, dtype=torch.float64).clamp(min=1e-300).log() for v in (x, y))
    lx = lx - lx.mean()
    return float((lx * (ly - ly.mean())).sum() / lx.square().sum())


def middle(values: Sequence[float]) -> float:
    """The median."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def claim(text: str, holds: bool, saw: str) -> dict[str, str]:
    """A claim, whether it shows, and the numbers behind that."""
    return {"claim": text, "shows": "yes" if holds else "no", "saw": saw}
