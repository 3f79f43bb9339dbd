"""Stick-breaking attention: each query breaks a stick from the nearest key backwards; no positions, no normalisation."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def stick_weights(logits: Tensor, allowed: Tensor) -> Tensor:
    """a_ij = z_ij prod_{j < m <= i} (1 - z_im), z = sigmoid(logits); in log space. logits [..., N, N], allowed as bool.

    Keys that are not allowed have z = 0 and log(1 - z) = 0. A row sums to 1 - prod_j (1 - z_ij), which is less than 1,
    and stays so.
    """
    left = logsigmoid(-logits).masked_fill(~allowed, 0.0)
    nearer = left.flip(-1).cumsum(-1).flip(-1) - left
    return (logsigmoid(logits) + nearer).exp().masked_fill(~allowed, 0.0)
