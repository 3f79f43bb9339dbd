"""Read-ME in a transformers decoder: one expert id per token for all layers, from token ids alone.

Shape legend: B batch, N tokens, P tokens of the prefix, D width, E experts, I inner width of an expert's own part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from moesaic.core.errors import BadInput


class RouterBlock(nn.Module):
    """A causal attention with rotary positions and a plain two-layer MLP, each behind an RMSNorm and added to the stream."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        B, N, D = x_BND.shape
        q, k, v = self.qkv(self.norm_1(x_BND)).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(_rotated(q), _rotated(k), v, is_causal=True)
        x_BND = x_BND + self.out(mixed.transpose(1, 2).reshape(B, N, D))
        return x_BND + self.down(gelu(self.up(self.norm_2(x_BND))))


def _rotated(x_BHNd: Tensor) -> Tensor:
    half = x_BHNd.shape[-1] // 2
    rate = 10000.0 ** (-torch.arange(half, device=x_BHNd.device) / half)
    angle_Nd = torch.arange(x_BHNd.shape[2], device=x_BHNd.device)[:, None] * rate
    a, b = x_BHNd[..., :half], x_BHNd[..., half : 2 * half]
    cos, sin = angle_Nd.cos().to(x_BHNd.dtype), angle_Nd.sin().to(x_BHNd.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, x_BHNd[..., 2 * half :]], -1)


class TokenRouter(nn.Module):
    """Token ids [B, P] to logits [B, P, E]; sees no hidden state, and at each place the tokens up to it."""

    def __init__(self, vocabulary: int, dim: int, blocks: int, heads: int, experts: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(RouterBlock(dim, heads) for _ in range(blocks))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, experts, bias=False)

    def forward(self, ids_BP: Tensor) -> Tensor:
        x_BPD = self.embed(ids_BP)
        for block in self.blocks:
            x_BPD = block(x_BPD)
        return self.head(self.norm(x_BPD))


class Schedule:
    """The expert of every token of the call in progress; `forced` puts one in every token's place."""

    def __init__(self) -> None:
        self.experts_BN: Tensor | None = None
        self.forced: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Schedule:
        return memo.setdefault(id(self), Schedule())


class ExtractedFfn(nn.Module):
    """Neurons that all domains keep, always on, and beside them those of the token's own expert.

    Experts are as wide as the widest of the layer; the others are filled up with neurons of zeros.
    """

    def __init__(self, dim: int, shared: int, inner: int, experts: int, schedule: Schedule) -> None:
        super().__init__()
        self.shared_gate_up = nn.Parameter(torch.empty(2 * shared, dim))
        self.shared_down = nn.Parameter(torch.empty(dim, shared))
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * inner, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, inner))
        self.schedule = schedule
        for p in self.parameters():
            nn.init.normal_(p, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        y = _gated(x, self.shared_gate_up, self.shared_down)
        chosen = self.schedule.experts_BN
        if chosen is None or chosen.shape != x.shape[:-1]:
            raise BadInput("read_me: an FFN was called outside of the model, which knows the tokens' experts")
        for e in range(len(self.down)):
            mine = chosen == e
            if mine.any():
                y = y.index_put((mine,), y[mine] + _gated(x[mine], self.gate_up[e], self.down[e]))
        return y


def _gated(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = linear(x, gate_up).chunk(2, -1)
    return linear(nn.functional.silu(gate) * up, down)


def install(model: Any, spec: dict[str, Any]) -> None:
    """`spec`: experts, and per layer the widths `shared` and `inner`; of the router `blocks` and `heads`."""
    config, schedule, decoder = model.config, Schedule(), model.get_decoder()
    E, D = spec["experts"], config.hidden_size
    for layer, shared, inner in zip(decoder.layers, spec["shared"], spec["inner"], strict=True):
        layer.mlp = ExtractedFfn(D, shared, inner, E, schedule)
    model.token_router = TokenRouter(config.vocab_size, D, spec["blocks"], spec["heads"], E)
    model.schedule = schedule

    def route(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the decoder runs, every token's expert is known. A cache carries the tokens that it has seen."""
        ids_BN = args[0] if args else kwargs.get("input_ids")
        if ids_BN is None:
            raise BadInput("read_me: the router reads token ids: call the model with input_ids")
        if schedule.forced is not None:
            schedule.experts_BN = torch.full_like(ids_BN, schedule.forced)
            return
        cache = kwargs.get("past_key_values")
        before = None
        if cache is not None and cache.get_seq_length():
            before = getattr(cache, "read_me_ids", None)
            if before is None:
                raise BadInput("read_me: this cache does not know its tokens: pass one cache to every call, from the first on")
        ids_BP = ids_BN if before is None else torch.cat([before, ids_BN], 1)
        if cache is not None:
            cache.read_me_ids = ids_BP
        schedule.experts_BN = model.token_router(ids_BP)[:, -ids_BN.shape[1] :].argmax(-1)

    decoder.register_forward_pre_hook(route, with_kwargs=True)
