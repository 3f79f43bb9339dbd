"""Barlow Twins: cross-correlations of two embeddings to the identity; among experts, to zero."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.balancing.balancer import Balancer, Reduce, Scope
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing


def standardise(z: Tensor, eps: float = 1e-5) -> Tensor:
    """Each feature to mean 0 and variance 1 over the rows of axis -2 (BatchNorm without affine)."""
    centred = z - z.mean(-2, keepdim=True)
    return centred / (centred.square().mean(-2, keepdim=True) + eps).sqrt()


def over_ranks(c: Tensor, reduce: Reduce | None) -> Tensor:
    """The mean of `c` over processes, with this process's gradient: the square of a mean is not the mean of squares.

    Gradients that are averaged over processes are then those of the loss of the mean.
    """
    if reduce is None:
        return c
    ranks = reduce(torch.ones((), device=c.device))
    return c + (reduce(c) / ranks - c).detach()


def barlow_twins(z1_ND: Tensor, z2_ND: Tensor, off_diagonal: float = 0.0051, reduce: Reduce | None = None) -> Tensor:
    """sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2 with C = z1^T z2 / N of standardised features (2103.03230)."""
    c_DD = over_ranks(standardise(z1_ND.float()).T @ standardise(z2_ND.float()) / len(z1_ND), reduce)
    diagonal_D = c_DD.diagonal()
    return (1 - diagonal_D).square().sum() + off_diagonal * (c_DD.square().sum() - diagonal_D.square().sum())


@register("balancing", "barlow_twins", paper="2103.03230", card="layers-and-balancing.md#barlow-twins")
class ExpertDecorrelation(Balancer):
    """sum_{a<b} ||C^ab||_F^2 / d^2, C^ab = Y_a^T Y_b / N of the experts' outputs on the same `output_tokens` tokens.

    A use of the paper's correlations for diversity among experts, not its objective (that is `barlow_twins`). The layer
    runs all experts on a random sample of its tokens and leaves Y in `routing.aux["outputs_END"]` (training only; 0
    without it): extra work of E * N pairs. Gates are not in Y. Y is projected to `width` features by a fixed random
    matrix and standardised over the sample; N must exceed `width`, or everything correlates. Identical experts give at
    least 1 / width per pair, independent ones about 1 / N.
    """

    def __init__(self, coefficient: float = 1e-3, output_tokens: int = 256, width: int = 64):
        if width < 1 or output_tokens <= width:
            raise BadInput(f"output_tokens={output_tokens}, width={width}: more tokens than features, or all correlates")
        self.coefficient, self.output_tokens, self.width = coefficient, output_tokens, width

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        y_END = routing.aux.get("outputs_END")
        if y_END is None or y_END.shape[0] < 2 or y_END.shape[1] < 2:
            return routing.logits_TE.sum() * 0.0
        return decorrelation(y_END, self.width, scope.reduce)


def decorrelation(y_END: Tensor, width: int, reduce: Reduce | None = None) -> Tensor:
    """The loss of `ExpertDecorrelation`. On one process through the [N, N] products, which hold the same squares."""
    dim = y_END.shape[-1]
    features = min(width, dim)
    y_END = y_END.float()
    if features < dim:
        generator = torch.Generator().manual_seed(dim)
        y_END = y_END @ (torch.randn(dim, features, generator=generator) * dim**-0.5).to(y_END)
    z_ENd = standardise(y_END)
    experts, rows = z_ENd.shape[:2]
    if reduce is None:  # ||A^T B||^2 = <A A^T, B B^T>, so that pairs of experts cost N * N and not E * E * d * d
        gram_ENN = z_ENd @ z_ENd.mT / rows
        total = gram_ENN.sum(0).square().sum()
        own = gram_ENN.square().sum()
        return 0.5 * (total - own) / features**2
    flat_NF = z_ENd.transpose(0, 1).reshape(rows, experts * features)
    c = over_ranks(flat_NF.T @ flat_NF / rows, reduce).view(experts, features, experts, features)
    squares_EE = c.square().sum((1, 3))
    return 0.5 * (squares_EE.sum() - squares_EE.diagonal().sum()) / features**2
