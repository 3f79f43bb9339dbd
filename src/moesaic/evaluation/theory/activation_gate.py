"""A learned temperature cannot be estimated behind a linear gate, and can behind a bent one (2401.13875).

Two Gaussian experts over one input; the second one's gate is fixed at 0, so that nothing is left to translate. Maximum
likelihood from starts near the truth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from moesaic.evaluation.theory.fitting import Parameters, claim, fit, log_density, middle, near, sample, slope

BENDS = {"linear": lambda z: z, "tanh": torch.tanh}


def truth() -> Parameters:
    values = {"b1": [2.0], "b0": [0.3], "log_tau": [-0.7], "a": [1.0, -1.0], "c": [0.6, -0.6], "log_s": [-1.2, -1.2]}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def gate(x_N: Tensor, p: Parameters, bend: str) -> Tensor:
    """log pi, [N, 2]: the first expert's logit is (bend(b1 x) + b0) / tau."""
    logit_N = (BENDS[bend](p["b1"] * x_N) + p["b0"]) / p["log_tau"].exp()
    return torch.stack([logsigmoid(logit_N), logsigmoid(-logit_N)], 1)


def degeneracy(bend: str) -> float:
    """Largest change of log pi when b1, b0 and tau are all multiplied by 3."""
    x_N, p = torch.linspace(-1, 1, 201, dtype=torch.float64), truth()
    scaled = {
        **p,
        "b1": 3 * p["b1"],
        "b0": 3 * p["b0"],
        "log_tau": p["log_tau"] + torch.log(torch.tensor(3.0, dtype=torch.float64)),
    }
    return float((gate(x_N, p, bend) - gate(x_N, scaled, bend)).abs().max())


def errors(bend: str, n: int, generator: torch.Generator) -> tuple[float, float]:
    """Errors of tau and of b1 / tau, as shares of the truth, of one fit to n samples."""
    p = truth()
    x_N, y_N = sample(n, lambda x, q: gate(x, q, bend), p, generator)
    found = fit(lambda q: -log_density(y_N, x_N, gate(x_N, q, bend), q).mean(), near(p, generator))
    tau, want = found["log_tau"].exp(), p["log_tau"].exp()
    ratio = found["b1"] / tau / (p["b1"] / want)
    return float((tau / want - 1).abs()), float((ratio - 1).abs())


def activation_gate(seed: int = 0, repetitions: int = 20, quick: bool = False) -> dict[str, Any]:
    """Errors of tau and b1 / tau over n for both gates: medians over the repetitions, and slopes of log error over log n."""
    sizes = [300, 1200] if quick else [1000, 4000, 16000, 64000]
    generator = torch.Generator().manual_seed(seed)
    lines: dict[str, list[list[float]]] = {}
    for bend in BENDS:
        for n in sizes:
            pairs = [errors(bend, n, generator) for _ in range(repetitions)]
            for name, values in zip(("tau", "b1 / tau"), zip(*pairs, strict=True), strict=True):
                lines.setdefault(f"{bend}: {name}", []).append([n, middle(values)])
    slopes = {name: round(slope(*zip(*points, strict=True)), 3) for name, points in lines.items()}
    flat = abs(slopes["linear: tau"]) < 0.15
    both = all(-0.75 < slopes[f"{bend}: b1 / tau"] < -0.25 for bend in ("linear",))
    bent = -0.75 < slopes["tanh: tau"] < -0.25
    same, differs = degeneracy("linear"), degeneracy("tanh")
    return {
        "claims": [
            claim(
                "scaling (b1, b0, tau) together leaves the linear gate as it is, and the tanh gate not",
                same < 1e-12 < 1e-3 < differs,
                f"largest change of log pi {same:.1e} and {differs:.2f}",
            ),
            claim("tau behind a linear gate does not improve with n", flat, f"slope {slopes['linear: tau']}"),
            claim("b1 / tau behind a linear gate does, at about n^-1/2", both, f"slope {slopes['linear: b1 / tau']}"),
            claim("tau behind a tanh gate does, at about n^-1/2", bent, f"slope {slopes['tanh: tau']}"),
            {
                "claim": "the linear gate's worst rate is 1 / log n",
                "shows": "unclear",
                "saw": "a flat line and 1 / log n are too alike over these n",
            },
        ],
        "slopes": slopes,
        "repetitions": repetitions,
        "plots": [
            {"title": "error of the estimate, median", "x": "samples", "y": "relative error", "log": True, "lines": lines}
        ],
    }
