"""Auxiliary-loss-free balancing: a controller nudges the selection bias by the load error."""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from moesaic.balancing.balancer import Balancer, Reduce, Scope
from moesaic.core.errors import BadInput
from moesaic.core.processes import sum_over_processes
from moesaic.core.recompute import recomputing
from moesaic.core.registry import register
from moesaic.core.routing import Routing

Rule = Literal["sign", "proportional", "eps_n", "eps_sqrt_n"]
RULES: tuple[Rule, ...] = get_args(Rule)


@register("balancing", "bias", paper="2408.15664", card="layers-and-balancing.md#alf-lb")
class BiasController(Balancer):
    """After optimiser step n: b_e += u_n * g(C - n_e), counts over all micro-steps and processes, C their mean.

    One dual step on the balanced-assignment programme (`balancing/dual.py`). `rule`: "sign" takes g = sign and u_n = u
    (practice); "proportional" g = error / C; "eps_n" and "eps_sqrt_n" the same with u_n = u / n and u / sqrt(n), the
    online versions of the theory (2512.03915). Without `rate`, u is 1e-3 for sigmoid scores and 0.1 / E for softmax ones,
    which shrink with E.

    The bias is the router's `bias_E` buffer: in checkpoints, outside the optimiser, float32. Sign steps never rest:
    `freeze_after` steps it stops, or when `freeze()` is called. The step number that this and the falling rates need is
    a buffer beside it, `bias_steps`. Whatever the scope of the losses, counts are summed over all processes, or the
    replicas of the bias would part.
    """

    def __init__(self, rate: float | None = None, rule: Rule = "sign", freeze_after: int | None = None):
        if rule not in RULES:
            raise BadInput(f"rule={rule!r}: one of {', '.join(RULES)}")
        if (rate is not None and rate < 0) or (freeze_after is not None and freeze_after < 0):
            raise BadInput(f"rate={rate}, freeze_after={freeze_after}: at least 0")
        self.rate, self.rule, self.freeze_after = rate, rule, freeze_after
        self.router: nn.Module | None = None
        self.frozen = False
        self._counts_E: Tensor | None = None
        self._reduce: Reduce = sum_over_processes

    @property
    def counts_steps(self) -> bool:
        return self.freeze_after is not None or self.rule in ("eps_n", "eps_sqrt_n")

    def bind(self, router: nn.Module) -> BiasController:
        """Steer this router, as MoE does with its own. Raises BadInput for a router without a selection bias."""
        if not hasattr(router, "bias_E"):
            raise BadInput(f"the bias controller moves a selection bias (bias_E), which {type(router).__name__} has not")
        self.router = router
        if self.rate is None:
            experts = cast(Tensor, router.bias_E).numel()
            self.rate = 1e-3 if getattr(router, "convention", "sigmoid") == "sigmoid" else 0.1 / experts
        if self.counts_steps and not hasattr(router, "bias_steps"):
            router.register_buffer("bias_steps", torch.zeros((), dtype=torch.int64))
        return self

    def observe(self, routing: Routing, scope: Scope) -> None:
        if recomputing():
            return
        counts_E = routing.counts_E(scope.mask_T)
        self._counts_E = counts_E if self._counts_E is None else self._counts_E + counts_E
        self._reduce = sum_over_processes if scope.reduce is None else scope.reduce

    @torch.no_grad()
    def after_step(self) -> None:
        if self._counts_E is None:
            return
        counts_E = self._reduce(self._counts_E)
        self._counts_E = None
        assert self.router is not None and self.rate is not None, "bind a router first"
        step = 1
        if self.counts_steps:
            steps = cast(Tensor, self.router.bias_steps)
            steps += 1
            step = int(steps)
        if self.frozen or (self.freeze_after is not None and step > self.freeze_after):
            return
        bias_E = cast(Tensor, self.router.bias_E)
        bias_E += update(counts_E, self.rate, self.rule, step).to(bias_E)

    def freeze(self) -> None:
        self.frozen = True


def update(counts_E: Tensor, rate: float, rule: Rule, step: int) -> Tensor:
    """What the bias is moved by after optimiser step `step` (from 1) with these counts, [E]; zeros at balance."""
    error_E = counts_E.mean() - counts_E
    if rule == "sign":
        return rate * error_E.sign()
    share_E = error_E / counts_E.mean().clamp(min=1)
    return rate * share_E / {"proportional": 1.0, "eps_n": step, "eps_sqrt_n": step**0.5}[rule]
