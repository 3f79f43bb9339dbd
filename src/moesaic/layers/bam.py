"""BAM: whole attention modules as softly routed experts, beside FFN experts, in parallel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from moesaic.core.context import RoutingContext
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.layers.attention import SelfAttention
from moesaic.layers.layer import Layer
from moesaic.layers.moe import MoE
from moesaic.layers.sequences import Sequences
from moesaic.routing.router import empty_padding
from moesaic.routing.score import LinearScore


class AttentionMixture(nn.Module):
    """sum over ALL experts of g_e MHA_e(x), g = softmax(W x): N attentions per token, N key-value caches.

    `shared_kv` has one key and one value projection, the first expert's, for all.
    """

    def __init__(self, dim: int, experts: int, heads: int, shared_kv: bool):
        super().__init__()
        self.score = LinearScore(dim, experts)
        self.experts = nn.ModuleList(SelfAttention(dim, heads, rotary=True) for _ in range(experts))
        self.shared_kv = shared_kv
        if shared_kv:
            for expert in list(self.experts)[1:]:
                del expert.key, expert.value

    def forward(self, x_BND: Tensor, gate_BNE: Tensor, allowed_BNN: Tensor) -> Tensor:
        first: SelfAttention = self.experts[0]  # type: ignore[assignment]
        y_BND = torch.zeros_like(x_BND)
        for e, expert in enumerate(self.experts):
            source = first if self.shared_kv else expert
            found = expert.attend(x_BND, source.key(x_BND), source.value(x_BND), allowed_BNN)  # type: ignore[operator]
            y_BND = y_BND + gate_BNE[..., e : e + 1].to(found.dtype) * found
        return y_BND


@register("layers", "bam", paper="2408.08274", card="layers-and-balancing.md#bam")
class BAM(Layer):
    """y = MoA(x) + MoE(x) of one normalised x: soft attention experts and top-1 FFN experts with weight p_top.

    p_top is not renormalised, so copies of one dense FFN give p_top * FFN at the start, not the FFN: warm up. Losses:
    1e-2 load balance and 1e-3 z on the FFN router (not given by the paper; the card's choice). The routing is the
    FFN's; `passes` holds attention's and FFN's. `causal=False` attends both ways. How dense models are copied and
    averaged into this layer is surgery's.
    """

    attends: ClassVar[bool] = True
    no_cache: ClassVar[str] = "a host's cache has no axis for the attention experts"

    def __init__(
        self,
        dim: int,
        experts: int = 4,
        width: int | None = None,
        heads: int = 4,
        shared_kv: bool = False,
        causal: bool = True,
        renormalised: bool = False,
        *,
        host: Iterable[str] | None = None,
    ):
        super().__init__()
        self.check_host(type(self), self.needs, host)
        self.causal = causal
        self.attention = AttentionMixture(dim, experts, heads, shared_kv)
        convention = "renormalised" if renormalised else "softmax"
        self.ffn = MoE(
            dim,
            experts,
            balance={"switch": 1e-2, "z": 1e-3},
            causal=causal,
            router_options={"k": 1, "convention": convention},
            bank_options={"width": 4 * dim if width is None else width},
        )

    def forward(self, x: Tensor, ctx: RoutingContext | None = None) -> tuple[Tensor, Routing]:
        ctx = self.context(ctx)
        x_TD, at = x.reshape(-1, x.shape[-1]), Sequences(x, ctx)
        logits_TE = self.attention.score(x_TD, ctx)
        gate_TE = logits_TE.softmax(-1)
        found_BND = self.attention(at.pad(x_TD), at.pad(gate_TE), at.allowed(self.causal))
        y_TD, routing = self.ffn(x_TD, ctx)
        all_TE = torch.arange(gate_TE.shape[1], device=x.device).expand_as(gate_TE)
        soft = empty_padding(Routing(logits_TE, gate_TE, all_TE, gate_TE), ctx)
        return (at.flat(found_BND) + y_TD).reshape(x.shape), routing.replace(passes=(soft, routing))

    def after_step(self) -> None:
        self.ffn.after_step()
