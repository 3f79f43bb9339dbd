"""What the reference model is trained on: next tokens or hidden ones, plus the balance losses of its layers.

Shape legend: B batch, N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moesaic.core.routing import Routing

IGNORED = -100
"""Label of a token that is not scored, as everywhere in transformers."""
EVERY = 7


def balance_losses(routings: Iterable[Routing]) -> dict[str, Tensor]:
    """Each method's loss with its coefficient, summed over layers."""
    total: dict[str, Tensor] = {}
    for routing in routings:
        for key, value in routing.aux.items():
            if key.startswith("loss/"):
                name = key.removeprefix("loss/")
                total[name] = total[name] + value if name in total else value
    return total


def language_loss(
    logits_BNV: Tensor, labels_BN: Tensor, balance: dict[str, Tensor], causal: bool, items: Tensor | int | None = None
) -> Tensor:
    """Mean cross-entropy of the scored tokens plus the balance losses.

    `items` is the number of scored tokens in all micro-steps of one optimiser step (transformers' Trainer gives it and
    then only adds up): this call's part of the cross-entropy, and of the balance losses, is its share of them.
    """
    if causal:
        logits_BNV, labels_BN = logits_BNV[:, :-1], labels_BN[:, 1:]
    labels = labels_BN.reshape(-1).to(logits_BNV.device)
    nats = cross_entropy(logits_BNV.flatten(0, 1).float(), labels, ignore_index=IGNORED, reduction="sum")
    scored = (labels != IGNORED).sum()
    share = 1.0 if items is None else scored / items
    loss = nats / (scored.clamp(min=1) if items is None else items)
    for value in balance.values():
        loss = loss + share * value
    return loss


def hide(
    ids_BN: Tensor, labels_BN: Tensor, real_BN: Tensor | None, step: int, mask_token_id: int | None
) -> tuple[Tensor, Tensor]:
    """Every seventh token, another seventh each step, is hidden; labels stay where something was hidden."""
    assert mask_token_id is not None
    position_N = torch.arange(ids_BN.shape[1], device=ids_BN.device)
    hidden_BN = ((position_N + step) % EVERY == 0).expand_as(ids_BN)
    scored_BN = hidden_BN if real_BN is None else hidden_BN & real_BN
    return ids_BN.masked_fill(hidden_BN, mask_token_id), labels_BN.masked_fill(~scored_BN, IGNORED)
