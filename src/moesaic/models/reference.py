"""The reference host: a small language model that gives a router every need it may have.

It is where a contract is proven before anything larger uses it. Causal (next token) or not (masked tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, rms_norm, scaled_dot_product_attention

from moesaic.core import registry
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.routing import Routing
from moesaic.layers.moe import MoE

HOST = frozenset({"previous", "carry", "attention", "token_ids", "positions", "sequence_ids", "step", "generator"})
"""What this host gives to routers."""


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions; padding keys are masked."""

    def __init__(self, dim: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BND: Tensor, mask_BN: Tensor | None) -> tuple[Tensor, MixByAttention]:
        batch, length, dim = x_BND.shape
        q, k, v = self.qkv(x_BND).view(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k = _rotate(q), _rotate(k)
        mix = MixByAttention(q, k, _allowed(length, self.causal, mask_BN, x_BND.device))
        y = scaled_dot_product_attention(q, k, v, attn_mask=mix.allowed)
        return self.out(y.transpose(1, 2).reshape(batch, length, dim)), mix


class MixByAttention:
    """`core.context.Attention` of one block: the attention run once more with other values."""

    def __init__(self, q_BHNC: Tensor, k_BHNC: Tensor, allowed: Tensor | None):
        self.q, self.k, self.allowed = q_BHNC, k_BHNC, allowed

    def mix(self, values_TC: Tensor) -> Tensor:
        batch, heads, length, _ = self.q.shape
        values = values_TC.to(self.q.dtype).view(batch, 1, length, -1).expand(-1, heads, -1, -1)
        mixed = scaled_dot_product_attention(self.q, self.k, values, attn_mask=self.allowed)
        return mixed.mean(1).reshape(batch * length, -1)

    def probs(self) -> Tensor:
        scores = self.q @ self.k.transpose(-1, -2) / self.q.shape[-1] ** 0.5
        if self.allowed is not None:
            scores = scores.masked_fill(~self.allowed, float("-inf"))
        return scores.softmax(-1)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, causal: bool, moe: MoE):
        super().__init__()
        self.attention, self.moe = Attention(dim, heads, causal), moe

    def forward(self, x_BND: Tensor, ctx: RoutingContext, mask_BN: Tensor | None) -> tuple[Tensor, Routing]:
        width = x_BND.shape[-1:]
        if not self.moe.attends:
            y_BND, mix = self.attention(rms_norm(x_BND, width), mask_BN)
            x_BND, ctx = x_BND + y_BND, ctx.replace(attention=mix)
        y_BND, routing = self.moe(rms_norm(x_BND, width), ctx)
        return x_BND + y_BND if self.moe.residual else y_BND, routing


class ReferenceLM(nn.Module):
    """`loss, routings = model(ids_BN, mask_BN)`: L blocks of attention and MoE over tied embeddings.

    Router and bank are registered names with options; modules that a router shares between layers (RMoE's GRU) are
    built once. With `causal=False` the model predicts the tokens hidden under `mask_id` instead of the next one.
    Raises BadInput or MissingNeed at construction for a router this host cannot serve.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        dim: int = 64,
        layers: int = 2,
        heads: int = 4,
        experts: int = 8,
        router: str = "topk",
        bank: str | None = None,
        width: int | None = None,
        balance: Mapping[str, float] | None = None,
        causal: bool = True,
        router_options: Mapping[str, Any] | None = None,
        bank_options: Mapping[str, Any] | None = None,
        checkpoint: bool = False,
    ):
        super().__init__()
        if dim % heads or dim // heads % 2:
            raise BadInput(f"dim={dim} must split into {heads} heads of an even width")
        entry = registry.get("routing", router)
        router_options = dict(router_options or {})
        if "vocab_size" in entry.parameters:
            router_options.setdefault("vocab_size", vocab_size + 1)
        self.causal, self.mask_id, self.checkpoint, self.step = causal, vocab_size, checkpoint, 0
        self.embed = nn.Embedding(vocab_size + 1, dim)
        nn.init.normal_(self.embed.weight, std=dim**-0.5)
        own = {key: value for key, value in router_options.items() if key in entry.parameters}
        self.shared = nn.ModuleDict(entry.build.shared(dim, **own))  # type: ignore[attr-defined]
        bank = entry.build.bank if bank is None else bank  # type: ignore[attr-defined]
        bank_options = {**({} if width is None else {"width": width}), **(bank_options or {})}
        self.blocks = nn.ModuleList(
            Block(
                dim,
                heads,
                causal,
                MoE(
                    dim,
                    experts,
                    entry.build(dim, experts, **router_options, **self.shared),
                    bank,
                    balance=balance or {},
                    causal=causal,
                    host=HOST,
                    bank_options=bank_options,
                ),
            )
            for _ in range(layers)
        )

    def hidden(self, ids_BN: Tensor, mask_BN: Tensor | None = None) -> tuple[Tensor, list[Routing]]:
        """Final hidden states [B, N, D] and each layer's routing."""
        batch, length = ids_BN.shape
        x_BND = self.embed(ids_BN)
        arange_N = torch.arange(length, device=ids_BN.device)
        ctx = RoutingContext(
            mode="train" if self.training else "eval",
            causal=self.causal,
            threads_state=True,
            token_ids=ids_BN.reshape(-1),
            positions=arange_N.repeat(batch),
            sequence_ids=torch.arange(batch, device=ids_BN.device).repeat_interleave(length),
            mask=None if mask_BN is None else mask_BN.reshape(-1),
            step=self.step,
        )
        routings: list[Routing] = []
        for layer, block in enumerate(self.blocks):
            last = routings[-1] if routings else None
            ctx = ctx.replace(layer=layer, previous=last and last.state, carry=(last and last.carry) or {}, memo={})
            if self.checkpoint and self.training:
                from torch.utils.checkpoint import checkpoint

                x_BND, routing = checkpoint(block, x_BND, ctx, mask_BN, use_reentrant=False)
            else:
                x_BND, routing = block(x_BND, ctx, mask_BN)
            routings.append(routing)
        return rms_norm(x_BND, x_BND.shape[-1:]), routings

    def logits(self, ids_BN: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        return self.hidden(ids_BN, mask_BN)[0] @ self.embed.weight[: self.mask_id].T

    def forward(self, ids_BN: Tensor, mask_BN: Tensor | None = None) -> tuple[Tensor, list[Routing]]:
        """Mean cross-entropy plus the layers' balance losses, and the routings."""
        inputs, targets, scored = (ids_BN[:, :-1], ids_BN[:, 1:], None) if self.causal else self._hide(ids_BN)
        mask_in = None if mask_BN is None else (mask_BN[:, :-1] if self.causal else mask_BN)
        x_BND, routings = self.hidden(inputs, mask_in)
        logits = x_BND @ self.embed.weight[: self.mask_id].T
        counted = scored
        if mask_BN is not None:
            counted = mask_BN[:, 1:] if scored is None else scored & mask_BN
        nats = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        loss = nats.mean() if counted is None else (nats * counted.flatten()).sum() / counted.sum().clamp(min=1)
        for routing in routings:
            for name, value in routing.aux.items():
                if name.startswith("loss/"):
                    loss = loss + value
        return loss, routings

    def _hide(self, ids_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every seventh token (another seventh each step) is hidden and to be guessed."""
        position_N = torch.arange(ids_BN.shape[1], device=ids_BN.device)
        hidden_BN = ((position_N + self.step) % 7 == 0).expand_as(ids_BN)
        return ids_BN.masked_fill(hidden_BN, self.mask_id), ids_BN, hidden_BN

    def after_step(self) -> None:
        """Call once after every optimiser step."""
        self.step += 1
        for block in self.blocks:
            block.moe.after_step()  # type: ignore[union-attr,operator]


def _rotate(x_BHNC: Tensor) -> Tensor:
    length, width = x_BHNC.shape[-2:]
    rate = 10000.0 ** (-torch.arange(0, width, 2, device=x_BHNC.device) / width)
    angle = torch.arange(length, device=x_BHNC.device).unsqueeze(1) * rate
    cos, sin = angle.cos().to(x_BHNC.dtype), angle.sin().to(x_BHNC.dtype)
    a, b = x_BHNC.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def _allowed(length: int, causal: bool, mask_BN: Tensor | None, device: torch.device) -> Tensor | None:
    """True where a query may look, broadcastable to [B, heads, N, N]; every query may see itself."""
    if not causal and mask_BN is None:
        return None
    see = torch.ones(length, length, dtype=torch.bool, device=device)
    see = (see.tril() if causal else see)[None, None]
    if mask_BN is not None:
        see = (see & mask_BN[:, None, None, :]) | torch.eye(length, dtype=torch.bool, device=device)
    return see
