"""ModuleFormer: stick-breaking attention modules and FFN modules, both sparse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from torch import Tensor, nn

from moesaic.core.context import RoutingContext
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.layers.attention import join, split
from moesaic.layers.attention_modules import AttentionModules
from moesaic.layers.layer import Layer, summed_losses
from moesaic.layers.moe import MoE
from moesaic.layers.sequences import Sequences
from moesaic.layers.stick_breaking import stick_weights
from moesaic.routing.module_former import ModuleGate


class ModularAttention(MoE):
    """y = sum over a token's k modules of w reduce_e(stick-breaking attention of map_e(x)) over shared keys and values.

    `heads` of `width` inside every module; one key and value projection. Always causal, no positional encoding. It is
    an MoE without a bank: routing and balance losses are its own, running is attention.
    """

    attends: ClassVar[bool] = True
    no_cache: ClassVar[str] = "its keys and values live in the layer's own pass over a sequence"

    def __init__(self, dim: int, router: ModuleGate, heads: int, width: int, balance: Mapping[str, float]):
        super().__init__(dim, router.num_experts, router, "product_key", balance=balance)
        del self.bank  # the smallest that MoE takes: the attention below runs in its place
        self.heads = heads
        self.modules_E = AttentionModules(dim, router.num_experts, heads * width)
        self.key = nn.Linear(dim, heads * width, bias=False)
        self.value = nn.Linear(dim, heads * width, bias=False)

    def forward(self, x: Tensor, ctx: RoutingContext | None = None) -> tuple[Tensor, Routing]:
        ctx = self.context(ctx)
        x_TD, at = x.reshape(-1, x.shape[-1]), Sequences(x, ctx)
        routing = self.router(x_TD, ctx)
        if ctx.training and self.balancers:
            routing = self._balance(routing, ctx)
        query_TKC = self.modules_E.map(x_TD, routing)
        slots = query_TKC.shape[1]
        query = split(at.pad(query_TKC.flatten(1)), slots * self.heads)
        key, value = (split(at.pad(part(x_TD)), self.heads).repeat(1, slots, 1, 1) for part in (self.key, self.value))
        logits = (query @ key.mT).float() / query.shape[-1] ** 0.5
        weights = stick_weights(logits, at.allowed(causal=True).unsqueeze(1)).to(x.dtype)
        found_TKC = at.flat(join(weights @ value)).view(query_TKC.shape)
        return self.modules_E.reduce(found_TKC, routing).reshape(x.shape), routing.replace(carry=ctx.carry)


@register("layers", "module_former", paper="2306.04640", card="layers-and-balancing.md#moduleformer")
class ModuleFormer(Layer):
    """h + A(LN h), then + F(LN of that): `experts` attention modules and as many FFN modules, k of each per token.

    Gates are MLPs over the full softmax, weights not renormalised; MI loss of weight `mi` on both (the released
    configuration has none; 0.01 is our choice). The routing is the FFN's; `passes` holds attention's and FFN's.
    """

    attends: ClassVar[bool] = True
    own_norm: ClassVar[bool] = True
    no_cache: ClassVar[str] = ModularAttention.no_cache

    def __init__(
        self,
        dim: int,
        experts: int = 32,
        k: int = 2,
        width: int | None = None,
        heads: int = 8,
        head_width: int = 64,
        mi: float = 0.01,
        router_options: Mapping[str, object] | None = None,
        *,
        host: Iterable[str] | None = None,
    ):
        super().__init__()
        self.check_host(type(self), self.needs, host)
        balance = {"mutual_information": mi} if mi else {}
        gates = [ModuleGate(dim, experts, k, **(router_options or {})) for _ in range(2)]  # type: ignore[arg-type]
        self.attention_norm, self.ffn_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = ModularAttention(dim, gates[0], heads, head_width, balance)
        bank = {"width": 2 * dim if width is None else width}
        self.ffn = MoE(dim, experts, gates[1], "mlp", balance=balance, bank_options=bank)

    def forward(self, x: Tensor, ctx: RoutingContext | None = None) -> tuple[Tensor, Routing]:
        ctx = self.context(ctx)
        found, first = self.attention(self.attention_norm(x), ctx)
        y, second = self.ffn(self.ffn_norm(x + found), ctx)
        passes = (first, second)
        return found + y, second.replace(aux=summed_losses(passes), passes=passes)

    def after_step(self) -> None:
        self.attention.after_step()
        self.ffn.after_step()
