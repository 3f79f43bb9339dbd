"""Bias controllers as dual steps (2512.03915): does every step improve, who moves, how even does it get, at what regret?"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from moesaic.balancing.bias import RULES, Rule, update
from moesaic.balancing.dual import assign, counts, dual
from moesaic.evaluation.theory.fitting import claim


def scores(tokens: int, experts: int, generator: torch.Generator) -> Tensor:
    """Sigmoid affinities, with favourites among the experts."""
    logits_TE = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    return (logits_TE + torch.linspace(1, -1, experts, dtype=torch.float64)).sigmoid()


def descend(g_TE: Tensor, rule: Rule, rate: float, steps: int, k: int) -> dict[str, Any]:
    """Iterate on fixed scores: MaxVio and dual by step, the share of steps that lowered the dual, wrong moves (k = 1)."""
    bias_E = torch.zeros(g_TE.shape[1], dtype=g_TE.dtype)
    capacity = k * g_TE.shape[0] / g_TE.shape[1]
    vio, value = [], []
    moves = wrong = 0
    for step in range(1, steps + 1):
        n_E = counts(g_TE, bias_E, k)
        vio.append(float(n_E.max() / capacity - 1))
        value.append(float(dual(g_TE, bias_E, k)))
        before = assign(g_TE, bias_E, k)
        bias_E = bias_E + update(n_E, rate, rule, step)
        if k == 1:
            old, new = before[:, 0], assign(g_TE, bias_E, k)[:, 0]
            moved = old != new
            right = ((n_E[old] > capacity) & (n_E[new] <= capacity)) | ((n_E[old] == capacity) & (n_E[new] < capacity))
            moves, wrong = moves + int(moved.sum()), wrong + int((moved & ~right).sum())
    falls = [b <= a + 1e-12 for a, b in itertools.pairwise(value)]
    return {"max_vio": vio, "dual": value, "falling": sum(falls) / len(falls), "moves": moves, "wrong": wrong}


def regret(rule: Rule, rate: float, rounds: int, experts: int, generator: torch.Generator) -> list[list[float]]:
    """Summed excess of the dual per token over that of the best fixed bias, new tokens in every round."""
    sample = scores(20_000, experts, generator)
    best_E = torch.zeros(experts, dtype=torch.float64)
    for step in range(1, 400):
        best_E = best_E + update(counts(sample, best_E, 1), 0.3, "eps_sqrt_n", step)
    bias_E, total, points = torch.zeros_like(best_E), 0.0, []
    for step in range(1, rounds + 1):
        g_TE = scores(64, experts, generator)
        total += float(dual(g_TE, bias_E, 1) - dual(g_TE, best_E, 1)) / 64
        bias_E = bias_E + update(counts(g_TE, bias_E, 1), rate, rule, step)
        if step in {2**i for i in range(3, 16)} or step == rounds:
            points.append([step, total])
    return points


def alf_lb(seed: int = 0, repetitions: int = 5, quick: bool = False) -> dict[str, Any]:
    """All rules on fixed scores (512 tokens, 16 experts), and their regret on a stream."""
    tokens, experts, steps = (128, 8, 200) if quick else (512, 16, 1500)
    rates: dict[Rule, float] = {"sign": 1e-3, "proportional": 1e-2, "eps_n": 0.3, "eps_sqrt_n": 0.05}
    g_TE = scores(tokens, experts, torch.Generator().manual_seed(seed))
    runs = {rule: descend(g_TE, rule, rates[rule], steps, 1) for rule in RULES}
    early = {rule: descend(g_TE, rule, rates[rule], steps // 10, 1)["falling"] for rule in RULES}
    rounds = 256 if quick else 4096
    streams: dict[str, list[list[float]]] = {}
    for rule in ("sign", "eps_n", "eps_sqrt_n"):
        seen = [regret(rule, rates[rule], rounds, experts, torch.Generator().manual_seed(seed + i)) for i in range(repetitions)]
        streams[rule] = [[point[0][0], sum(p[1] for p in point) / repetitions] for point in zip(*seen, strict=True)]
    grows = {rule: points[-1][1] / max(points[-3][1], 1e-12) for rule, points in streams.items()}
    log_growth = math.log(rounds) / math.log(streams["eps_n"][-3][0])
    least = min(min(run["dual"]) for run in runs.values())
    every = max(1, steps // 150)

    def line(key: str, offset: float = 0.0) -> dict[str, list[list[float]]]:
        return {rule: [[i + 1, run[key][i] - offset] for i in range(0, steps, every)] for rule, run in runs.items()}

    sign = runs["sign"]
    final = {rule: round(min(run["max_vio"][-steps // 10 :]), 4) for rule, run in runs.items()}
    return {
        "claims": [
            claim(
                "sign steps move tokens only from overloaded experts to others",
                sign["wrong"] == 0 < sign["moves"],
                f"{sign['wrong']} of {sign['moves']} moves were wrong (K = 1)",
            ),
            claim(
                "each step improves the Lagrangian, until the step is as large as what is left",
                early["sign"] == 1.0,
                f"dual fell in {early['sign']:.0%} of the first {steps // 10} sign steps, in {sign['falling']:.0%} of all",
            ),
            claim("the load gets nearly even", max(final["sign"], final["proportional"]) < 0.15, f"MaxVio at the end {final}"),
            {
                "claim": "with steps u / n the regret grows like log n",
                "shows": "unclear",
                "saw": f"from n = {streams['eps_n'][-3][0]:g} to {rounds} it grew {grows['eps_n']:.2f} times, "
                f"log n {log_growth:.2f} times; "
                f"constant sign steps {grows['sign']:.2f} times",
            },
        ],
        "falling": {rule: run["falling"] for rule, run in runs.items()},
        "final_max_vio": final,
        "rates": rates,
        "repetitions": repetitions,
        "plots": [
            {
                "title": "dual above the lowest seen, by step",
                "x": "steps",
                "y": "dual",
                "log": True,
                "lines": line("dual", least - 1e-3),
            },
            {"title": "MaxVio by step", "x": "steps", "y": "MaxVio", "log": False, "lines": line("max_vio")},
            {"title": "regret per token on a stream", "x": "rounds", "y": "regret", "log": True, "lines": streams},
        ],
    }
