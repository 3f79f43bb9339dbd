"""Passes of a dense model over text, for conversions that look at its neurons.

Shape legend: B batch, N tokens of a row, I neurons of an FFN, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.core.documents import Document
from moesaic.core.errors import BadInput
from moesaic.surgery.objective import decoder_layers
from moesaic.view.load import load


def opened(folder: Path, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """A dense model in memory and its tokenizer. Raises BadInput where it has none."""
    model, tokenizer = load(folder, dense_ok=True, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise BadInput(f"{folder} has no tokenizer, and this method reads text: put its tokenizer files beside config.json")
    return model, tokenizer


def rows(tokenizer: Any, documents: Iterable[Document], seq_len: int, most: int) -> list[Tensor]:
    """Rows of ids [1, N], documents one after another, each after the end-of-text token; `most` tokens at most.

    The last row is as long as what is left. Raises BadInput for less than two tokens.
    """
    ids: list[int] = []
    start = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        ids += [*start, *tokenizer(document.text, add_special_tokens=False)["input_ids"]]
        if len(ids) >= most:
            break
    found = [torch.tensor([ids[at : at + seq_len]]) for at in range(0, min(len(ids), most), seq_len)]
    found = [row for row in found if row.shape[1] > 1]
    if not found:
        raise BadInput("the text is empty: there is nothing to look at")
    return found


def ffns(model: Any) -> list[Any]:
    """The FFN of every decoder layer."""
    layers: dict[int, Any] = dict(decoder_layers(model))
    return [layers[number].mlp for number in sorted(layers)]


@torch.no_grad()
def activations(model: Any, batches: Sequence[Tensor]) -> Tensor:
    """Mean |h| of every neuron (h: what down_proj gets), float32 [L, I]."""
    layers = ffns(model)
    total = [torch.zeros(module.down_proj.in_features, dtype=torch.float64) for module in layers]

    def look(at: int) -> Any:
        def add(module: Any, args: tuple) -> None:
            total[at] += args[0].double().abs().flatten(0, -2).sum(0)

        return add

    handles = [module.down_proj.register_forward_pre_hook(look(at)) for at, module in enumerate(layers)]
    try:
        for ids_BN in batches:
            model(input_ids=ids_BN, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return (torch.stack(total) / sum(ids.numel() for ids in batches)).float()


def taylor(model: Any, batches: Sequence[Tensor]) -> Tensor:
    """Per neuron the sum over its weights of |dL/dw * w|, float32 [L, I]; L is the mean loss per token over all batches.

    The absolute value is of each weight's product, before the sum. Only FFN weights get gradients; they are added up in
    float32.
    """
    layers, tokens = ffns(model), sum(ids.numel() - len(ids) for ids in batches)
    weights = [[getattr(module, f"{part}_proj").weight for part in ("gate", "up", "down")] for module in layers]
    asked = {p: p.requires_grad for p in model.parameters()}
    sums = [[torch.zeros(w.shape, dtype=torch.float32) for w in three] for three in weights]
    try:
        model.requires_grad_(False)
        for three in weights:
            for w in three:
                w.requires_grad_(True)
        for ids_BN in batches:
            loss = model(input_ids=ids_BN, labels=ids_BN, use_cache=False).loss * (ids_BN.numel() - len(ids_BN)) / tokens
            for total, found in zip(
                [s for three in sums for s in three],
                torch.autograd.grad(loss, [w for three in weights for w in three]),
                strict=True,
            ):
                total += found.float()
    finally:
        for p, wanted in asked.items():
            p.requires_grad_(wanted)
    scores = []
    for three, grads in zip(weights, sums, strict=True):
        gate, up, down = ((g * w.detach().float()).abs() for g, w in zip(grads, three, strict=True))
        scores.append(gate.sum(1) + up.sum(1) + down.sum(0))
    return torch.stack(scores)
