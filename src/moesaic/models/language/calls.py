"""What one call of the model tells its routers: positions, sequences, padding, and ids that the caller gives.

Shape legend: B batch, N tokens of the call, M cached and new tokens, T = B * N.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput


class CallInputs(NamedTuple):
    """The call's tokens and where they stand; `mask_BM` is True for real tokens, None when all are."""

    batch: int
    length: int
    ids_BN: Tensor | None
    position_BN: Tensor
    mask_BM: Tensor | None

    @classmethod
    def of(
        cls, ids_BN: Tensor | None, x_BND: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past: int
    ) -> CallInputs:
        batch, length = x_BND.shape[:2]
        mask_BM = real_tokens(attention_mask)
        if mask_BM is not None and mask_BM.shape != (batch, past + length):
            raise BadInput(
                f"attention_mask is {list(mask_BM.shape)}; {length} tokens after {past} cached ones need "
                f"[{batch}, {past + length}]"
            )
        if position_ids is not None:
            position_BN = position_ids.expand(batch, length)
        elif mask_BM is not None:  # padding in front does not count: a sequence is rotated alike in any batch
            position_BN = (mask_BM.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        else:
            position_BN = torch.arange(past, past + length, device=x_BND.device).expand(batch, length)
        if mask_BM is not None and not torch.compiler.is_compiling() and bool(mask_BM.all()):
            mask_BM = None
        return cls(batch, length, ids_BN, position_BN, mask_BM)

    def context(
        self,
        mode: Literal["train", "eval"],
        causal: bool,
        given: Mapping[str, Tensor | None],
        step: int | None,
        needs: frozenset[str],
    ) -> RoutingContext:
        device = self.position_BN.device
        mask_T = None if self.mask_BM is None else self.mask_BM[:, -self.length :].reshape(-1)
        if mask_T is None and "mask" in needs:
            mask_T = torch.ones(self.batch * self.length, dtype=torch.bool, device=device)
        return RoutingContext(
            mode=mode,
            causal=causal,
            threads_state=True,
            token_ids=None if self.ids_BN is None else self.ids_BN.reshape(-1),
            positions=self.position_BN.reshape(-1),
            sequence_ids=torch.arange(self.batch, device=device).repeat_interleave(self.length),
            mask=mask_T,
            step=step,
            **{name: None if value is None else self.per_token(name, value) for name, value in given.items()},  # type: ignore[arg-type]
        )

    def per_token(self, name: str, value: Tensor) -> Tensor:
        """[B] or [B, N] -> [T]. Raises BadInput naming the input of another shape."""
        value = torch.as_tensor(value, device=self.position_BN.device)
        if value.shape == (self.batch,):
            value = value.unsqueeze(1).expand(self.batch, self.length)
        if value.shape != (self.batch, self.length):
            raise BadInput(f"{name} is {list(value.shape)}: give one per sequence, [{self.batch}], or one per token, "
                           f"[{self.batch}, {self.length}]")  # fmt: skip
        return value.reshape(-1)


def real_tokens(attention_mask: Tensor | None) -> Tensor | None:
    """transformers' mask of ones and zeros as booleans. Raises BadInput for one that is not [B, tokens]."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise BadInput(
            f"attention_mask is {list(attention_mask.shape)}: give [batch, tokens], 1 for real tokens; caches of a fixed size "
            "(cache_implementation=static), which bring another, are not supported"
        )
    return attention_mask != 0
