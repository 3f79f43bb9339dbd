"""What a trained cell is asked: bits per byte, load, whether its routing still moves, and what a token costs.

Shape legend: B rows, N tokens of a row, T = B * N, E router rows, L MoE layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moesaic.core.documents import Document, read_documents
from moesaic.core.routing import Routing
from moesaic.evaluation.bits_per_byte import score_documents
from moesaic.models.language.loss import EVERY, IGNORED, hide


def held_out(data: str, per_domain: int) -> list[Document]:
    """The first `per_domain` characters of every domain, whole documents and the beginning of one."""
    left: dict[str, int] = {}
    found = []
    for document in read_documents(data):
        room = left.setdefault(document.domain, per_domain)
        if room > 0:
            found.append(Document(document.text[:room], document.domain))
            left[document.domain] = room - len(document.text)
    return found


def bits_per_byte(model: Any, tokenizer: Any, documents: list[Document], context: int) -> float:
    """Total bits over total bytes of a model that predicts the next token."""
    scores = score_documents(model, tokenizer, documents, context).values()
    return sum(score.nats for score in scores) / math.log(2) / sum(score.bytes for score in scores)


@torch.no_grad()
def masked_bits_per_byte(model: Any, tokenizer: Any, rows_BN: Tensor) -> float:
    """Bits per byte of the hidden tokens of a masked model: every position of every row is hidden once."""
    sizes_V = torch.tensor([len(tokenizer.decode([i]).encode()) for i in range(len(tokenizer))])
    nats, size = 0.0, 0
    for phase in range(EVERY):
        ids_BN, labels_BN = hide(rows_BN, rows_BN, None, phase, model.config.mask_token_id)
        logits = model(input_ids=ids_BN, use_cache=False).logits.flatten(0, 1).float()
        nats += nn.functional.cross_entropy(logits, labels_BN.flatten(), ignore_index=IGNORED, reduction="sum").item()
        size += int(sizes_V[labels_BN[labels_BN != IGNORED].cpu()].sum())
    return nats / math.log(2) / size


@torch.no_grad()
def routings_of(model: Any, rows_BN: Tensor) -> tuple[Routing, ...]:
    """The routing of every MoE layer in evaluation; none of a model that shows none. Masked models see the rows whole."""
    return getattr(model.get_decoder()(input_ids=rows_BN, use_cache=False), "routings", None) or ()


def expert_sets(routing: Routing) -> Tensor | None:
    """Which rows run which token, bool [T, E] on the CPU; None where no row is chosen (soft and keyed routings)."""
    if routing.soft or routing.keyed_T2HN is not None:
        return None
    device = routing.logits_TE.device
    on_TE = torch.zeros(routing.logits_TE.shape[0], routing.num_experts, dtype=torch.bool, device=device)
    if routing.pairs is not None:
        on_TE[routing.pairs.token_S, routing.pairs.expert_S] = True
        return on_TE.cpu()
    assert routing.experts_TK is not None
    token_TK = torch.arange(on_TE.shape[0], device=device).unsqueeze(1).expand_as(routing.experts_TK)
    chosen_TK = routing.experts_TK >= 0
    on_TE[token_TK[chosen_TK], routing.experts_TK[chosen_TK]] = True
    return on_TE.cpu()


def changed(before: list[Tensor | None], after: list[Tensor | None]) -> float | None:
    """Share of (token, layer) whose set of experts differs between two checkpoints; None when no layer chooses."""
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    return sum((a != b).any(1).float().mean().item() for a, b in pairs) / len(pairs)


def load(model: Any, routings: tuple[Routing, ...]) -> dict[str, Any]:
    """Of the experts that a bank serves (null rows left out), per layer then averaged: MaxVio, the coefficient of
    variation, experts that nothing chose; and how many a token gets. Empty where no layer chooses."""
    violations, spreads, idle, per_token = [], [], 0, []
    for routing, layer in zip(routings, _sparse(model), strict=True):
        if routing.soft or routing.keyed_T2HN is not None:
            continue
        counts_E = routing.counts_E()[: getattr(getattr(layer, "router", None), "true_experts", None)]
        share_E = counts_E / counts_E.sum().clamp(min=1)
        violations.append(share_E.max().item() * len(share_E) - 1)
        spreads.append(share_E.std(correction=0).item() * len(share_E))
        idle += int((counts_E == 0).sum())
        per_token.append(counts_E.sum().item() / routing.tokens)
    if not violations:
        return {"max_vio": None, "load_cv": None, "idle_experts": None, "experts_per_token": None}
    return {
        "max_vio": sum(violations) / len(violations),
        "load_cv": sum(spreads) / len(spreads),
        "idle_experts": idle,
        "experts_per_token": sum(per_token) / len(per_token),
    }


def _sparse(model: Any) -> list[nn.Module]:
    return [block.moe for block in model.model.blocks if block.moe is not None]


@torch.no_grad()
def flops_per_token(model: Any, rows_BN: Tensor) -> float:
    """FLOPs of the matrix products of one forward over the tokens, head included; attention counts its whole square."""
    training = model.training
    model.eval()
    try:
        with _plain(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(input_ids=rows_BN, use_cache=False)
    finally:
        model.train(training)
    return counter.get_total_flops() / rows_BN.numel()


@contextmanager
def _plain(model: Any) -> Iterator[None]:
    """Kernels and attention that run as torch's own matrix products, which can be counted; put back afterwards."""
    banks = [(module, module.kernel) for module in model.modules() if isinstance(getattr(module, "kernel", None), str)]
    attention = model.config._attn_implementation
    for bank, _ in banks:
        bank.kernel = "reference"
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for bank, kernel in banks:
            bank.kernel = kernel
        model.set_attn_implementation(attention)


def fit_width(build: Any, rows_BN: Tensor, goal: float, low: int = 4, high: int = 1024) -> tuple[int, float]:
    """The width (a multiple of 4) whose model costs nearest to `goal` FLOPs per token, and what it costs.

    `build(width)` makes a model; the cost must grow with the width.
    """
    costs: dict[int, float] = {}

    def cost(width: int) -> float:
        if width not in costs:
            with torch.random.fork_rng(devices=[]):
                costs[width] = flops_per_token(build(width), rows_BN)
        return costs[width]

    first, last = low // 4, high // 4
    while first < last:
        middle = (first + last) // 2
        first, last = (middle + 1, last) if cost(4 * middle) < goal else (first, middle)
    near = min({max(low, 4 * first - 4), 4 * first}, key=lambda width: abs(cost(width) - goal))
    return near, costs[near]
