"""Who serves a text: the mean router probability of every expert, each sequence weighing the same however long it is.

Shape legend: T tokens, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from moesaic.core.documents import Document
from moesaic.core.errors import BadInput
from moesaic.trace import corpus
from moesaic.view.block import Block, View
from moesaic.view.tap import Choice

ENOUGH = 1 << 17
"""Tokens that an attribution reads, of a longer text; the paper asks for more than 100,000."""


def probabilities(block: Block, choice: Choice) -> Tensor:
    """Router probabilities [T, E], float32, over all experts: the softmax of the router's scores, whatever it selects by.

    Raises BadInput for a block that shows no scores.
    """
    logits_TE = block.logits(choice)
    if logits_TE is None:
        raise BadInput(f"{block.name}: its router shows no scores, so no expert can be found by them")
    return logits_TE.float().softmax(-1)


def attribution(model: Any, tokenizer: Any, documents: Iterable[Document], context: int | None = None) -> dict[int, Tensor]:
    """Layer number -> s [E], float64: (1/Z) sum over sequences of the mean probability over their tokens. Sums to 1.

    A sequence is a piece of a document, of `context` tokens at most; the first `ENOUGH` tokens are read. Raises BadInput
    where there is no text.
    """
    blocks, found, tokens = View(model), [], 0
    for piece in corpus.pieces(documents, tokenizer, corpus.context_of(model.config, context)):
        found.append(piece)
        tokens += len(piece.ids)
        if tokens >= ENOUGH:
            break
    if not found:
        raise BadInput("there is no text to find its experts by")
    sums = {block.layer: torch.zeros(block.num_experts, dtype=torch.float64) for block in blocks}
    now: list[corpus.Batch] = []

    def watch(choice: Choice, block: Block) -> None:
        mask_BN = now[-1].mask_BN.to(choice.x.device).double()
        probs_BNE = probabilities(block, choice).double().reshape(*mask_BN.shape, -1)
        mean_BE = (probs_BNE * mask_BN.unsqueeze(-1)).sum(1) / mask_BN.sum(1, keepdim=True)
        sums[block.layer] += mean_BE.sum(0).cpu()

    size = corpus.batch_size(model, max(len(piece.ids) for piece in found))
    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.on_choice(watch, scores=True))
        corpus.read(model, found, size=size, before=lambda batch: now.append(batch))
    return {layer: total_E / len(found) for layer, total_E in sums.items()}


def choices(model: Any, tokenizer: Any, documents: Iterable[Document], context: int | None = None) -> dict[int, Tensor]:
    """Layer number -> the experts [T, K] that every token chose, ids sorted; padding left out."""
    blocks = View(model)
    now: list[corpus.Batch] = []
    found = list(corpus.pieces(documents, tokenizer, corpus.context_of(model.config, context)))
    kept: dict[int, list[Tensor]] = {block.layer: [] for block in blocks}

    def watch(choice: Choice, block: Block) -> None:
        real_T = now[-1].mask_BN.reshape(-1).bool()
        kept[block.layer].append(choice.ids.detach().cpu().reshape(len(real_T), -1)[real_T].short())

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.on_choice(watch))
        corpus.read(
            model, found, size=corpus.batch_size(model, max(len(p.ids) for p in found)), before=lambda batch: now.append(batch)
        )
    return {layer: torch.cat(parts) for layer, parts in kept.items()}


def overlap(before: dict[int, Tensor], after: dict[int, Tensor]) -> float:
    """Share of a token's experts that stayed the same, mean over tokens and layers: 1 for an untouched routing."""
    shares = []
    for layer, ids_TK in before.items():
        same_TK = (ids_TK.unsqueeze(-1) == after[layer].unsqueeze(-2)).any(-1) & (ids_TK >= 0)
        shares.append(float(same_TK.sum()) / max(1, int((ids_TK >= 0).sum())))
    return sum(shares) / max(1, len(shares))
