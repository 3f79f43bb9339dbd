"""A short way to a small reference model, for tests and experiments: `loss, routings = ReferenceLM(router=...)(ids)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from moesaic.core.routing import Routing
from moesaic.models.language.attention import MixByAttention
from moesaic.models.language.build import HOST
from moesaic.models.language.config import MoesaicConfig
from moesaic.models.language.model import Block, MoesaicForCausalLM

__all__ = ["HOST", "MixByAttention", "ReferenceLM"]


class ReferenceLM(nn.Module):
    """`language`, a MoesaicForCausalLM with few and short arguments, called as `loss, routings = model(ids_BN, mask_BN)`.

    A masked model (`causal=False`) gets one token more, which hides the others. `checkpoint` recomputes blocks in the
    backward pass; `options` are further fields of MoesaicConfig.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        dim: int = 64,
        layers: int = 2,
        heads: int = 4,
        experts: int = 8,
        router: str | None = "topk",
        bank: str | None = None,
        width: int | None = None,
        balance: Mapping[str, Any] | None = None,
        causal: bool = True,
        router_options: Mapping[str, Any] | None = None,
        bank_options: Mapping[str, Any] | None = None,
        checkpoint: bool = False,
        **options: Any,
    ):
        super().__init__()
        config = MoesaicConfig(
            vocab_size=vocab_size + (not causal),
            hidden_size=dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            experts=experts,
            router=router,
            bank=bank,
            expert_width=width,
            balance=dict(balance or {}),
            causal=causal,
            mask_token_id=None if causal else vocab_size,
            router_options=dict(router_options or {}),
            bank_options=dict(bank_options or {}),
            **options,
        )
        self.language = MoesaicForCausalLM(config)
        if checkpoint:
            self.language.gradient_checkpointing_enable()

    @property
    def blocks(self) -> list[Block]:
        return self.language.model.blocks

    def hidden(self, ids_BN: Tensor, mask_BN: Tensor | None = None, **given: Tensor) -> tuple[Tensor, list[Routing]]:
        """Final hidden states [B, N, D] and each layer's routing. `given` are task_ids and their like, [B] or [B, N]."""
        out = self.language.model(ids_BN, mask_BN, use_cache=False, **given)
        return out.last_hidden_state, list(out.routings)

    def logits(self, ids_BN: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        return self.language(ids_BN, mask_BN, use_cache=False).logits

    def forward(self, ids_BN: Tensor, mask_BN: Tensor | None = None, **given: Tensor) -> tuple[Tensor, list[Routing]]:
        """Mean cross-entropy of the real tokens plus the layers' balance losses, and the routings."""
        labels_BN = ids_BN if mask_BN is None else ids_BN.masked_fill(~mask_BN, -100)
        out = self.language(ids_BN, mask_BN, labels=labels_BN, output_routings=True, **given)
        return out.loss, list(out.routings)

    def after_step(self) -> None:
        """Call once after every optimiser step."""
        self.language.after_step()
