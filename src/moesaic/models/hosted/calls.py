"""What a call of a transformers decoder tells the routers inside it: tokens, positions, sequences, padding, the last routing.

Shape legend: B batch, N tokens of the call, T = B * N.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.routing import Routing

GIVES = frozenset({"previous", "token_ids", "positions", "sequence_ids", "mask", "step", "generator"})
"""Fields of RoutingContext that a decoder's inputs tell. Attention, ids of tasks and experts' activations they do not."""


class Calls(threading.local):
    """The decoder's call in progress in this thread; shared by the routers of one model."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self.batch = self.length = 0
        self.seed = 0
        self.previous: Any = None
        self.routings: dict[int, Routing] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        return memo.setdefault(id(self), Calls())

    def begin(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the decoder: reads its inputs, and forgets the call before."""
        ids_BN = args[0] if args else kwargs.get("input_ids")
        x = kwargs.get("inputs_embeds") if ids_BN is None else ids_BN
        if not isinstance(x, Tensor):
            raise BadInput("a retrofitted model takes input_ids or inputs_embeds")
        self.batch, self.length = x.shape[:2]
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        positions = kwargs.get("position_ids")
        if positions is None or positions.dim() != 2:
            positions = torch.arange(past, past + self.length, device=x.device).unsqueeze(0)
        mask = kwargs.get("attention_mask")
        real_T = None
        if isinstance(mask, Tensor) and mask.dim() == 2 and not bool((mask[:, -self.length :] != 0).all()):
            real_T = (mask[:, -self.length :] != 0).reshape(-1)
        self.fields = {
            "token_ids": None if ids_BN is None else ids_BN.reshape(-1),
            "positions": positions.expand(self.batch, self.length).reshape(-1),
            "sequence_ids": torch.arange(self.batch, device=x.device).repeat_interleave(self.length),
            "mask": real_T,
        }
        self.seed = int(torch.randint(2**40, ())) if decoder.training else 0
        self.previous, self.routings = None, {}

    def context(self, tokens: int, training: bool, layer: int, step: int, needs: frozenset[str], device: Any) -> RoutingContext:
        """The context of one router's call. Outside the decoder (a block by itself) it is one sequence of `tokens`."""
        fields = self.fields
        if tokens != self.batch * self.length:
            fields = {
                "positions": torch.arange(tokens, device=device),
                "sequence_ids": torch.zeros(tokens, dtype=torch.long, device=device),
            }
        if "mask" in needs and fields.get("mask") is None:
            fields = {**fields, "mask": torch.ones(tokens, dtype=torch.bool, device=device)}
        generator = torch.Generator(device).manual_seed(self.seed + layer) if "generator" in needs else None
        return RoutingContext(
            mode="train" if training else "eval",
            causal=True,
            previous=self.previous,
            threads_state=True,
            layer=layer,
            step=step,
            generator=generator,
            **fields,
        )
