"""Experts as bags of neurons: one row per neuron, the nearest among others, and clusters of them.

A neuron (segment) is (gate row, up row, down column) and the biases that belong to it; its row is these side by side.
J, S neurons, W values of a row, I neurons of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.surgery.align import by_neuron
from moesaic.view.bank import ExpertWeights

SLICE = 1 << 24
"""Similarities that are held at a time."""


def rows(expert: ExpertWeights) -> Tensor:
    """[I, W] float32."""
    return torch.cat([tensor.float() for tensor in by_neuron(expert).values()], dim=1)


def from_rows(rows_IW: Tensor, like: ExpertWeights) -> ExpertWeights:
    """The expert of these neurons; what is no neuron's (the bias of the second product) is `like`'s."""
    found: dict[str, Tensor] = {}
    at = 0
    for name, part in by_neuron(like).items():
        block_IX = rows_IW[:, at : at + part.shape[1]]
        at += part.shape[1]
        found[name] = block_IX.T if name == "down" else block_IX[:, 0] if name.endswith("_bias") else block_IX
    return ExpertWeights({name: found.get(name, tensor).contiguous() for name, tensor in like.items()})


def compared(rows_IW: Tensor, expert: ExpertWeights, gate: bool, each: bool) -> Tensor:
    """Rows of unit length, of the parts to compare: without the gate's where not `gate`; `each` part first of unit length."""
    parts, at = [], 0
    for name, part in by_neuron(expert).items():
        mine = rows_IW[:, at : at + part.shape[1]]
        at += part.shape[1]
        if gate or not name.startswith("gate"):
            parts.append(_unit(mine) if each else mine)
    return _unit(torch.cat(parts, dim=1))


def _unit(rows_SW: Tensor) -> Tensor:
    return rows_SW / rows_SW.norm(dim=1, keepdim=True).clamp(min=1e-30)


def nearest(unit_JW: Tensor, others_SW: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the largest cosine with the others, and whose: [J], [J]. A slice of rows at a time."""
    values, places = [], []
    for part in unit_JW.split(max(1, SLICE // max(len(others_SW), 1))):
        value, place = (part @ others_SW.T).max(1)
        values.append(value)
        places.append(place)
    return torch.cat(values), torch.cat(places)


def magnitude(rows_IW: Tensor, expert: ExpertWeights) -> Tensor:
    """|largest| + |smallest| value of a neuron's first part: its gate row, or its up row where there is no gate. [I]"""
    width = next(iter(by_neuron(expert).values())).shape[1]
    first = rows_IW[:, :width]
    return first.amax(1).abs() + first.amin(1).abs()


def recombine(rows_SW: Tensor, weight_S: Tensor, first_S: Tensor, count: int, own: int, rounds: int = 30) -> Tensor:
    """Weighted spherical k-means of neurons into `count`: [count, W].

    Assignment by cosine; a centre is the weighted mean of its members, each rescaled to the members' mean length, and then
    brought to that length itself. It starts from the `count` neurons of largest `first_S`. An empty cluster takes the one of
    the first `own` neurons that is served worst.
    """
    unit_SW, length_S = _unit(rows_SW), rows_SW.norm(dim=1)
    centres_CW = rows_SW[torch.argsort(first_S, descending=True, stable=True)[:count]]
    labels_S = torch.full((len(rows_SW),), -1)
    for _ in range(rounds):
        cosine_S, new_S = nearest(unit_SW, _unit(centres_CW))
        new_S = _reseeded(new_S, cosine_S, count, own)
        if torch.equal(new_S, labels_S):
            break
        labels_S = new_S
        number_C = torch.bincount(labels_S, minlength=count).float()
        mean_C = torch.zeros(count).index_add_(0, labels_S, length_S) / number_C
        scaled_SW = unit_SW * (mean_C[labels_S] * weight_S)[:, None]
        sum_CW = torch.zeros(count, rows_SW.shape[1]).index_add_(0, labels_S, scaled_SW)
        centres_CW = _unit(sum_CW) * mean_C[:, None]
    return centres_CW


def _reseeded(labels_S: Tensor, cosine_S: Tensor, count: int, own: int) -> Tensor:
    for cluster in torch.nonzero(torch.bincount(labels_S, minlength=count) == 0).flatten().tolist():
        spare_S = torch.bincount(labels_S, minlength=count)[labels_S] > 1
        spare_S[own:] = False
        if not bool(spare_S.any()):
            spare_S = torch.bincount(labels_S, minlength=count)[labels_S] > 1
        labels_S[int(cosine_S.masked_fill(~spare_S, torch.inf).argmin())] = cluster
    return labels_S
