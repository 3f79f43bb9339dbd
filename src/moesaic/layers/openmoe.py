"""OpenMoE's layer: the dense FFN stays as a branch beside the experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moesaic.balancing.balancer import Balancer
from moesaic.core.registry import register
from moesaic.experts.bank import ExpertBank
from moesaic.experts.shared import SharedExperts
from moesaic.layers.moe import MoE
from moesaic.routing.router import Router


@register("layers", "openmoe", paper="2402.01739", card="layers-and-balancing.md#openmoe")
class OpenMoE(MoE):
    """y = FFN(x) + MoE(x): softmax, then top-2, weights not renormalised; losses 0.01 load balance and 1e-4 router z.

    The dense branch takes `dense_width` (default: the experts'). Capacity is the router's option: per-batch with
    position priority drops tokens late in the batch, which is what the paper measured. Its output-logit z-loss (1e-3)
    belongs to a model's loss, not to a layer.
    """

    def __init__(
        self,
        dim: int,
        experts: int = 16,
        router: str | Router = "topk",
        bank: str | ExpertBank | None = None,
        width: int | None = None,
        dense_width: int | None = None,
        balance: Mapping[str, float] | Iterable[Balancer] | None = None,
        *,
        causal: bool = False,
        host: Iterable[str] | None = None,
        router_options: Mapping[str, Any] | None = None,
        bank_options: Mapping[str, Any] | None = None,
    ):
        width = dim if width is None else width
        if router == "topk":
            router_options = {"convention": "softmax", **(router_options or {})}
        super().__init__(
            dim,
            experts,
            router,
            bank,
            SharedExperts(dim, width if dense_width is None else dense_width),
            {"switch": 0.01, "z": 1e-4} if balance is None else balance,
            causal=causal,
            host=host,
            router_options=router_options,
            bank_options={"width": width, **(bank_options or {})},
        )
