"""Monet's experts as pairs (i, j): what masks do to a keyed bank, and how much of each pair a domain uses.

T tokens, H heads, N keys per side, D model width, M inner width. A mask is bool [N, N], True where the pair is masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.core.errors import BadInput
from moesaic.experts.monet import Monet

FEW = 16
"""Up to so many masked pairs their contributions are subtracted; more go through the dense weights [T, N, N]."""


def banks(model: nn.Module) -> list[Monet]:
    """The Monet banks of a model, in order. Raises BadInput where it has none."""
    found = [module for module in model.modules() if isinstance(module, Monet)]
    if not found:
        raise BadInput("monet: this model has no Monet layer, whose experts are pairs; mote masks experts of other models")
    return found


def masked(bank: Monet, x_TD: Tensor, gates_T2HN: Tensor, mask_NN: Tensor) -> Tensor:
    """The bank's output with the masked pairs left out, no renormalisation. Nothing masked is `run_keyed` itself."""
    count = int(mask_NN.sum())
    if not count:
        return Monet.run_keyed(bank, x_TD, gates_T2HN)
    if count <= min(FEW, mask_NN.numel() // 4):
        return subtracted(bank, x_TD, gates_T2HN, mask_NN)
    return dense(bank, x_TD, gates_T2HN, mask_NN)


def subtracted(bank: Monet, x_TD: Tensor, gates_T2HN: Tensor, mask_NN: Tensor) -> Tensor:
    """The factored sum less each masked pair: for a few."""
    y_TD = Monet.run_keyed(bank, x_TD, gates_T2HN)
    for i, j in mask_NN.nonzero().tolist():
        weight_T = (gates_T2HN[:, 0, :, i] * gates_T2HN[:, 1, :, j]).sum(1)
        y_TD = y_TD - weight_T.to(x_TD.dtype).unsqueeze(1) * bank.expert(i * bank.n + j, x_TD)
    return y_TD


def dense(bank: Monet, x_TD: Tensor, gates_T2HN: Tensor, mask_NN: Tensor) -> Tensor:
    """The sum over pairs from their weights [T, N, N]. The vertical form's factored terms rest on sums of gates over one side,
    which a mask makes another number for every key: they are sums over the masked weights here."""
    weight_TNN = pair_weights(gates_T2HN).masked_fill(mask_NN.to(gates_T2HN.device), 0).to(x_TD.dtype)
    left_TN, right_TN = weight_TNN.sum(2), weight_TNN.sum(1)
    a_TNM = bank._inner(x_TD, "in_NMD", "in_bias_NM")
    crossed_TNM = weight_TNN.mT @ a_TNM
    if bank.kind == "horizontal":
        return bank._outer(crossed_TNM, "out_NMD") + right_TN @ bank._bias("out_bias_ND")
    c_TNM = bank._inner(x_TD, "in2_NMD", "in2_bias_NM")
    first = bank._outer(left_TN.unsqueeze(-1) * a_TNM, "out11_NMD") + bank._outer(weight_TNN @ c_TNM, "out12_NMD")
    second = bank._outer(crossed_TNM, "out21_NMD") + bank._outer(right_TN.unsqueeze(-1) * c_TNM, "out22_NMD")
    first, second = first + left_TN @ bank._bias("out1_bias_ND"), second + right_TN @ bank._bias("out2_bias_ND")
    return torch.cat([first, second], -1)


def pair_weights(gates_T2HN: Tensor) -> Tensor:
    """sum_h g1_hi g2_hj, [T, N, N]."""
    return gates_T2HN[:, 0].mT @ gates_T2HN[:, 1]


@contextmanager
def instead(found: Sequence[Monet], run: Callable[[int, Monet, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Inside the block, `run(number, bank, x, gates)` stands for the banks' `run_keyed`."""

    def of(number: int, bank: Monet) -> Any:
        return lambda x_TD, gates_T2HN: run(number, bank, x_TD, gates_T2HN)

    for number, bank in enumerate(found):
        bank.__dict__["run_keyed"] = of(number, bank)
    try:
        yield
    finally:
        for bank in found:
            bank.__dict__.pop("run_keyed", None)


@contextmanager
def measuring(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside the block, the mean mass of every pair per token, [N, N] per bank, of all calls so far; it sums to the heads."""
    found = banks(model)
    sums = [torch.zeros(bank.n, bank.n, dtype=torch.float64) for bank in found]
    tokens = [0] * len(found)
    masses = [torch.zeros(bank.n, bank.n, dtype=torch.float64) for bank in found]

    def run(number: int, bank: Monet, x_TD: Tensor, gates_T2HN: Tensor) -> Tensor:
        g1_RN, g2_RN = (gates_T2HN[:, side].detach().flatten(0, 1).double() for side in (0, 1))
        sums[number] += (g1_RN.mT @ g2_RN).cpu()
        tokens[number] += len(x_TD)
        masses[number].copy_(sums[number] / tokens[number])
        return Monet.run_keyed(bank, x_TD, gates_T2HN)

    with instead(found, run):
        yield masses


def owned(masses: Sequence[Tensor], ratio: float = 2.0) -> list[Tensor]:
    """Per domain a mask of its pairs: those whose mass is at least `ratio` times that of every other domain. Each [..., N, N].

    The factor 2 is the card's recollection of the paper. A pair that no domain uses is nobody's.
    """
    if len(masses) < 2:
        raise BadInput("monet: attribution needs the masses of two domains at least")
    stacked = torch.stack(list(masses))
    found = []
    for d in range(len(stacked)):
        others = torch.cat([stacked[:d], stacked[d + 1 :]]).amax(0)
        found.append((stacked[d] >= ratio * others) & (stacked[d] > 0))
    return found


def correlated(masses_P: Tensor, scores_P: Tensor, share: float) -> Tensor:
    """The `share` of pairs whose mass correlates most with a score of the texts (toxicity): masses [P, ..., N, N] -> a mask."""
    if not 0 < share <= 1 or len(masses_P) != len(scores_P) or len(masses_P) < 2:
        raise BadInput(f"monet: share {share} is above 0, at most 1, and every one of two or more texts has a score")
    mass, score = masses_P - masses_P.mean(0), (scores_P - scores_P.mean()).to(masses_P)
    covariance = torch.tensordot(score, mass, 1)
    r = covariance / (mass.square().sum(0) * score.square().sum()).sqrt().clamp(min=1e-30)
    count = max(1, round(share * r.numel()))
    chosen = torch.zeros(r.numel(), dtype=torch.bool)
    chosen[r.flatten().topk(count).indices] = True
    return chosen.view(r.shape)
