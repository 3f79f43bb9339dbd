"""What each tier collects at one layer, as sums, counts and maxima that add up over batches and shards.

Tiers and their consumers: surgery-and-steering.md, section A. Every statistic is a tensor whose name ends in how two
parts of it combine: `_sum`, `_count` and `_hist` add, `_max` takes the larger. Shape legend: T tokens, K slots, E experts,
D model width, I expert inner width, S routed pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.view.block import Block

BINS = 64
Statistics = dict[str, Tensor]


class Seen(NamedTuple):
    """The real tokens of one domain in one call of one layer."""

    x_TD: Tensor
    ids_TK: Tensor
    """int64; -1 in an empty slot."""
    weights_TK: Tensor
    logits_TE: Tensor | None

    def only(self, rows_T: Tensor) -> Seen:
        return Seen(*(None if part is None else part[rows_T] for part in self))  # type: ignore[arg-type]


def r0(seen: Seen, block: Block) -> Statistics:
    """Router only: selection counts, gate and probability mass, co-selection, Gram matrix of the logits, histograms."""
    E, ids_TK = block.num_experts, seen.ids_TK
    weights_TK = seen.weights_TK.double()
    picked_TE = torch.zeros(len(ids_TK), E + 1, dtype=torch.float64, device=ids_TK.device)
    slots_TK = torch.where(ids_TK < 0, E, ids_TK)
    picked_TE.scatter_(1, slots_TK, 1.0)
    mass_TE = torch.zeros_like(picked_TE).scatter_add_(1, slots_TK, weights_TK)
    picked_TE, mass_TE = picked_TE[:, :E], mass_TE[:, :E]
    found: Statistics = {
        "token_count": torch.tensor(float(len(ids_TK)), dtype=torch.float64),
        "selection_count": picked_TE.sum(0),
        "gate_sum": mass_TE.sum(0),
        "co_selection_count": picked_TE.T @ picked_TE,
    }
    top_TK = weights_TK.masked_fill(ids_TK < 0, 0).sort(-1, descending=True).values
    if top_TK.shape[1] > 1:
        found["second_over_first_hist"] = _histogram(top_TK[:, 1] / top_TK[:, 0].clamp(min=1e-30))
    if seen.logits_TE is not None:
        logits_TE = seen.logits_TE.double()
        probs_TE = torch.softmax(logits_TE, -1)
        found["probability_sum"] = probs_TE.sum(0)
        finite_TE = torch.nan_to_num(logits_TE, neginf=0.0, posinf=0.0)
        found["logit_gram_sum"] = finite_TE.T @ finite_TE
        entropy_T = -(probs_TE * probs_TE.clamp(min=1e-300).log()).sum(-1) / math.log(max(E, 2))
        found["entropy_hist"] = _histogram(entropy_T)
    return found


def _histogram(values_T: Tensor) -> Tensor:
    return torch.histc(values_T.double().cpu().clamp(0, 1), BINS, 0, 1)


class Ran(NamedTuple):
    """One expert on the tokens routed to it."""

    e: int
    x_SD: Tensor
    gates_S: Tensor
    h_SI: Tensor
    f_SD: Tensor


def r1(found: Statistics, ran: Ran, experts: int) -> None:
    """Outputs of a routed expert: norms, gated norms, moments of each output and inner neuron."""
    h_SI, f_SD = ran.h_SI.double(), ran.f_SD.double()
    norm_S = f_SD.norm(dim=-1)
    values = {
        "norm_sum": norm_S.sum(),
        "gated_norm_sum": (ran.gates_S * norm_S).sum(),
        "norm_square_sum": norm_S.square().sum(),
        "norm_max": norm_S.max(),
        "output_max": f_SD.abs().max(),
        "output_sum": f_SD.sum(0),
        "output_square_sum": f_SD.square().sum(0),
        "inner_abs_sum": h_SI.abs().sum(0),
        "inner_square_sum": h_SI.square().sum(0),
        "inner_max": h_SI.abs().amax(0),
    }
    _put(found, ran.e, values, experts)


def r2(found: Statistics, ran: Ran, experts: int) -> None:
    """Second moments of the inputs and of the inner activations of an expert, float32: E (D^2 + I^2) values."""
    x_SD, h_SI = ran.x_SD.float(), ran.h_SI.float()
    _put(found, ran.e, {"input_gram_sum": x_SD.T @ x_SD, "inner_gram_sum": h_SI.T @ h_SI}, experts)


def _put(found: Statistics, e: int, values: Statistics, experts: int) -> None:
    """Into the sums of all calls: second moments of all experts are large, and are held once."""
    for name, value in values.items():
        if name not in found:
            found[name] = value.new_zeros(experts, *value.shape)
        held = found[name][e]
        torch.maximum(held, value, out=held) if name.endswith("_max") else held.add_(value)


def a1(seen: Seen, block: Block, every: int = 1) -> Statistics:
    """Every expert on every token (or on one in `every`): the sums of their outputs. E / K times the work of the layer."""
    x_TD = seen.x_TD[::every]
    sums = [block.bank.run_one(e, x_TD)[1].double().sum(0) for e in range(block.num_experts)]
    return {"all_output_sum": torch.stack(sums), "all_token_count": torch.tensor(float(len(x_TD)), dtype=torch.float64)}


ROUTED = {"R1": r1, "R2": r2}
"""Tiers that look at every expert that was chosen, which then runs once for all of them."""

FORWARD = ("R0", *ROUTED, "A1")
"""Tiers of one forward pass that add up. C (features) is kept row by row, B needs a backward pass."""

NAMES = (*FORWARD, "C", "B")


@torch.no_grad()
def collect(found: Statistics, seen: Seen, block: Block, tiers: Sequence[str], every: int = 1) -> None:
    """Add what these tiers of `FORWARD` say of one call to `found`, in place; `every` thins out the tokens of A1."""
    _add(found, r0(seen, block) if "R0" in tiers else {})
    wanted = [tier for name, tier in ROUTED.items() if name in tiers]
    for e, rows_S, gates_S in _routed(seen, block.num_experts) if wanted else ():
        x_SD = seen.x_TD[rows_S]
        ran = Ran(e, x_SD, gates_S, *block.bank.run_one(e, x_SD))
        for tier in wanted:
            tier(found, ran, block.num_experts)
    _add(found, a1(seen, block, every) if "A1" in tiers else {})


def _add(found: Statistics, more: Statistics) -> None:
    for name, value in more.items():
        found[name] = combine(name, found[name], value) if name in found else value


def parse(tiers: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Tier names in order. Raises BadInput for one that does not exist."""
    words = [w.strip().upper() for w in (tiers.split(",") if isinstance(tiers, str) else tiers) if w.strip()]
    for word in words:
        if word not in NAMES:
            raise BadInput(f"tier {word!r}: one of {', '.join(NAMES)}")
    if not words:
        raise BadInput(f"no tier named: one or more of {', '.join(NAMES)}")
    return tuple(name for name in NAMES if name in words)


def combine(name: str, one: Tensor, other: Tensor) -> Tensor:
    """Two parts of a statistic as one."""
    return torch.maximum(one, other) if name.endswith("_max") else one + other


def bytes_per_layer(block: Block, tiers: tuple[str, ...]) -> int:
    """Memory that one layer's statistics take while they are collected."""
    E, D, inner = block.num_experts, block.bank.width, block.bank.run_one(0, _one_row(block))[0].shape[1]
    total = 8 * 3 * E * E
    if "R1" in tiers:
        total += 8 * E * (5 + 2 * D + 3 * inner)
    if "R2" in tiers:
        total += 4 * E * (D * D + inner * inner)
    if "A1" in tiers:
        total += 8 * E * D
    if "B" in tiers:
        total += 4 * sum(p.numel() for p in block.experts.parameters())
    return total


def _one_row(block: Block) -> Tensor:
    weight = block.experts.down_proj
    return torch.zeros(1, block.bank.width, dtype=weight.dtype, device=weight.device)


def _routed(seen: Seen, experts: int) -> list[tuple[int, Tensor, Tensor]]:
    """(expert, its token rows, their weights) of every expert that was chosen."""
    rows_TK, slots_TK = torch.nonzero(seen.ids_TK >= 0, as_tuple=True)
    ids_S = seen.ids_TK[rows_TK, slots_TK]
    gates_S = seen.weights_TK[rows_TK, slots_TK].double()
    order_S = torch.argsort(ids_S, stable=True)
    counts = torch.bincount(ids_S, minlength=experts).tolist()
    parts = zip(range(experts), rows_TK[order_S].split(counts), gates_S[order_S].split(counts), strict=True)
    return [(e, rows_S, gates_S) for e, rows_S, gates_S in parts if len(rows_S)]
