"""Hydra's SSM path: a gated diagonal recurrence, and the fast surrogate for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, sigmoid, softplus


def scan(decay_BND: Tensor, input_BND: Tensor) -> Tensor:
    """s_t = decay_t * s_{t-1} + input_t along N, s before the first = 0, in log2 N doublings."""
    step, length = 1, input_BND.shape[1]
    while step < length:
        earlier = pad(input_BND[:, :-step], (0, 0, step, 0))
        input_BND = input_BND + decay_BND * earlier
        decay_BND = decay_BND * pad(decay_BND[:, :-step], (0, 0, step, 0))
        step *= 2
    return input_BND


class StateSpace(nn.Module):
    """alpha = exp(-softplus(delta) softplus(lambda)); s_t = alpha_t s_{t-1} + B_t U_t; y_t = LN(C_t s_{t-1} + skip U_t).

    y_t reads the state before t: the skip is what shows it the token itself. Padding (`real_BN` False) neither enters
    the state nor lets it decay.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.inputs = nn.Linear(dim, 4 * dim, bias=False)
        self.rate_D = nn.Parameter(torch.linspace(-3.0, 1.0, dim))
        self.skip_D = nn.Parameter(torch.ones(dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_BND: Tensor, real_BN: Tensor) -> Tensor:
        delta, b, c, u = self.inputs(x_BND).float().chunk(4, -1)
        real_BN1 = real_BN.unsqueeze(-1)
        decay = torch.exp(-softplus(delta) * softplus(self.rate_D.float())).masked_fill(~real_BN1, 1.0)
        state = scan(decay, (b * u).masked_fill(~real_BN1, 0.0))
        before = pad(state[:, :-1], (0, 0, 1, 0))
        return self.norm((c * before + self.skip_D.float() * u).to(x_BND.dtype))


class GatedConvolution(nn.Module):
    """The surrogate: a causal depthwise convolution of 8 tokens, gated, its kernel starting at zero."""

    def __init__(self, dim: int, kernel: int = 8):
        super().__init__()
        self.kernel_KD = nn.Parameter(torch.zeros(kernel, dim))
        self.gate = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BND: Tensor, real_BN: Tensor) -> Tensor:
        seen = x_BND.masked_fill(~real_BN.unsqueeze(-1), 0.0)
        shifts = [
            pad(seen[:, : seen.shape[1] - back], (0, 0, back, 0)) for back in range(min(len(self.kernel_KD), seen.shape[1]))
        ]
        mixed = sum((shift * self.kernel_KD[back] for back, shift in enumerate(shifts)), torch.zeros_like(seen))
        return mixed * sigmoid(self.gate(x_BND))
