"""THOR's objective: two forwards of one batch, whose random experts (and dropout) must agree."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def symmetric_kl(logits_a: Tensor, logits_b: Tensor, mask: Tensor | None = None) -> Tensor:
    """1/2 sum over tokens and vocabulary of (p - q)(log p - log q), a scalar in nats; [..., V] logits, mask [...].

    Zero for equal logits, symmetric, never negative. It is a sum over tokens, as the paper's cross-entropy is: with a mean
    cross-entropy divide by the number of tokens (`two_forwards` does). log_softmax in float32, so nothing underflows.
    """
    log_p, log_q = logits_a.float().log_softmax(-1), logits_b.float().log_softmax(-1)
    per_token = 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
    return per_token.sum() if mask is None else (per_token * mask).sum()


def two_forwards(
    forward: Callable[[], tuple[Tensor, Tensor]], alpha: float = 5.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and agreement of one training step: `forward()` is called twice and returns (mean cross-entropy, logits).

    loss = CE_1 + CE_2 + alpha * symmetric KL per token. alpha = 0 trains random experts only; one expert with dropout is
    R-Drop. `mask` marks the tokens that count, True for real ones; it costs two forwards and backwards per step.
    """
    first, logits_a = forward()
    second, logits_b = forward()
    tokens = logits_a[..., 0].numel() if mask is None else mask.sum().clamp(min=1)
    agreement = symmetric_kl(logits_a, logits_b, mask) / torch.as_tensor(tokens, device=logits_a.device)
    return first + second + alpha * agreement, agreement
