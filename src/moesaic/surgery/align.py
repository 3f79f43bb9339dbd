"""Bring two experts' neurons into the same order before they are averaged.

An expert is an unordered set of I neurons: (gate row, up row, down column) with their biases. The order is the assignment of
largest summed similarity; it changes no output. I inner width, D model width, T tokens.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.surgery.layer import Layer
from moesaic.view.bank import ExpertWeights

ALIGNMENTS = ("none", "weight", "activation")


def check_align(align: str) -> None:
    """Raises BadInput for a way of aligning that does not exist."""
    if align not in ALIGNMENTS:
        raise BadInput(f"align {align!r}: one of {', '.join(ALIGNMENTS)}")


def by_neuron(expert: ExpertWeights) -> dict[str, Tensor]:
    """The expert's tensors with the neuron on the first axis: [I, D] each, biases of neurons [I, 1]."""
    rows = {name: tensor for name, tensor in expert.items() if name in ("gate", "up")}
    rows |= {name: tensor[:, None] for name, tensor in expert.items() if name in ("gate_bias", "up_bias")}
    return rows | {"down": expert["down"].T}


def permuted(expert: ExpertWeights, order_I: Tensor) -> ExpertWeights:
    """The same function with its neurons in another order: neuron i is what neuron order[i] was."""
    return ExpertWeights(
        {
            name: tensor[:, order_I] if name == "down" else tensor if name == "down_bias" else tensor[order_I]
            for name, tensor in expert.items()
        }
    )


def weight_affinity(reference: ExpertWeights, expert: ExpertWeights) -> Tensor:
    """Inner products of the neurons of two experts, float32 [I, I]: all their tensors together, one order for all."""
    ours, theirs = by_neuron(reference), by_neuron(expert)
    total: Tensor | None = None
    for name, rows in ours.items():
        part = rows.float() @ theirs[name].float().T
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def activation_affinity(h_TI: Tensor, other_TI: Tensor) -> Tensor:
    """Pearson correlation of the neurons of two experts on the same tokens, [I, I]; 0 with a neuron that never changes."""
    a_TI, b_TI = ((h.double() - h.double().mean(0)) for h in (h_TI, other_TI))
    a_TI, b_TI = (h / h.norm(dim=0).clamp(min=1e-30) for h in (a_TI, b_TI))
    return a_TI.T @ b_TI


def match(affinity_II: Tensor) -> Tensor:
    """order[i]: the neuron of the second expert that is put at i of the first; the largest sum of affinities."""
    _, order = linear_sum_assignment(affinity_II.cpu().numpy(), maximize=True)
    return torch.from_numpy(order)


def aligned(layer: Layer, reference: int, others: list[int], align: str) -> dict[int, ExpertWeights]:
    """The experts `others` in the neuron order of `reference`, float32 copies; "none" leaves them as they are."""
    check_align(align)
    first = layer.expert(reference)
    if align == "activation":
        x_TD = layer.features()[0]
        h_TI = layer.run(reference, x_TD)[0].float()
    found = {}
    for e in others:
        expert = layer.expert(e)
        if align == "weight":
            expert = permuted(expert, match(weight_affinity(first, expert)))
        elif align == "activation":
            expert = permuted(expert, match(activation_affinity(h_TI, layer.run(e, x_TD)[0].float())))
        found[e] = expert
    return found
