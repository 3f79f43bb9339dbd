"""Auxiliary-loss-free balancing: a controller nudges the selection bias by the sign of the load error."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from moesaic.balancing.balancer import Balancer, Reduce, Scope
from moesaic.core.errors import BadInput
from moesaic.core.recompute import recomputing
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "bias", paper="2408.15664", card="layers-and-balancing.md#alf-lb")
class BiasController(Balancer):
    """After every optimiser step: b_e += u * sign(mean n - n_e), n summed over micro-steps and processes.

    Reads as one dual step on the balanced-assignment programme. `rule` "proportional" uses (mean n - n_e) / mean n
    instead of its sign. The bias is the router's `bias_E` buffer: in checkpoints, outside the optimiser, float32.
    With softmax scores use u about 0.1 / E of the sigmoid's. Sign steps never rest: `freeze()` near the end.
    """

    def __init__(self, rate: float = 1e-3, rule: Literal["sign", "proportional"] = "sign"):
        if rule not in ("sign", "proportional"):
            raise BadInput(f"rule={rule!r}: one of sign, proportional")
        self.rate, self.rule = rate, rule
        self.router: nn.Module | None = None
        self.frozen = False
        self._counts_E: Tensor | None = None
        self._reduce: Reduce | None = None

    def bind(self, router: nn.Module) -> BiasController:
        """Steer this router, as MoE does with its own. Raises BadInput for a router without a selection bias."""
        if not hasattr(router, "bias_E"):
            raise BadInput(f"the bias controller moves a selection bias (bias_E), which {type(router).__name__} has not")
        self.router = router
        return self

    def observe(self, routing: Routing, scope: Scope) -> None:
        if recomputing():
            return
        counts_E = routing.counts_E(scope.mask_T) if scope.counts_E is None else scope.counts_E
        self._counts_E = counts_E if self._counts_E is None else self._counts_E + counts_E
        self._reduce = scope.reduce

    @torch.no_grad()
    def after_step(self) -> None:
        if self._counts_E is None:
            return
        counts_E = self._counts_E if self._reduce is None else self._reduce(self._counts_E)
        self._counts_E = None
        if self.frozen:
            return
        assert self.router is not None, "bind a router first"
        bias_E = cast(Tensor, self.router.bias_E)
        error_E = counts_E.mean() - counts_E
        step_E = error_E.sign() if self.rule == "sign" else error_E / counts_E.mean().clamp(min=1)
        bias_E += self.rate * step_E.to(bias_E.device)

    def freeze(self) -> None:
        self.frozen = True
