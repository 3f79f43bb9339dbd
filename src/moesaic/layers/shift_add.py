"""ShiftAddViT's layer: sensitive tokens multiply, the rest shift, balanced by latency."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moesaic.balancing.latency import Latency
from moesaic.core.registry import register
from moesaic.experts.shift_add import ShiftAdd
from moesaic.layers.moe import MoE


@register("layers", "shift_add", paper="2306.06446", card="layers-and-balancing.md#shiftaddvit")
class ShiftAddLayer(MoE):
    """Noisy top-1 (noise std 1 / E in training) over the `shift_add` bank, weight = the softmax of the chosen expert, so
    that the router learns from the task; loss `latency` of 0.01 over the bank's latencies.

    The paper's binarised linear attention is an attention, not an expert, and is not part of this layer.
    """

    def __init__(
        self,
        dim: int,
        experts: int = 2,
        width: int | None = None,
        alpha: float = 0.01,
        *,
        causal: bool = False,
        host: Iterable[str] | None = None,
        router_options: Mapping[str, Any] | None = None,
        bank_options: Mapping[str, Any] | None = None,
    ):
        bank = ShiftAdd(dim, experts, width, **(bank_options or {}))
        options = {"k": 1, "convention": "softmax", "noise": "vmoe", **(router_options or {})}
        balance = [Latency(alpha, bank.latency_E.tolist())] if alpha else []
        super().__init__(dim, experts, "topk", bank, balance=balance, causal=causal, host=host, router_options=options)
