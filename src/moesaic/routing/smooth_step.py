"""The smooth step, and gates made of it: soft binary decisions that become exactly 0 or 1."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.context import RoutingContext
from moesaic.core.routing import Routing
from moesaic.routing.router import empty_padding


def smooth_step(t: Tensor, gamma: float) -> Tensor:
    """0 up to -gamma / 2, 1 from gamma / 2, the cubic -2 t^3 / gamma^3 + 3 t / (2 gamma) + 1/2 between; C1."""
    t = (t / gamma).clamp(-0.5, 0.5)
    return -2 * t**3 + 1.5 * t + 0.5


def sparse_routing(mass_TE: Tensor, weights_TE: Tensor, ctx: RoutingContext, path_TKE: Tensor) -> Routing:
    """Routing of a soft gate with exact zeros: every expert whose weight is positive runs, in order of id.

    logits are log mass (a finite floor where it is 0), so that their softmax is the normalised mass. In training the
    selectors' own distributions over leaves or codes are left in `aux["path_TKE"]` for the entropy loss.
    """
    experts_E = torch.arange(weights_TE.shape[1], device=weights_TE.device)
    off_TE = weights_TE.detach() <= 0
    routing = Routing(
        mass_TE.clamp(min=1e-30).log(),
        weights_TE,
        experts_E.expand_as(weights_TE).masked_fill(off_TE, -1),
        weights_TE.masked_fill(off_TE, 0.0),
        aux={"path_TKE": path_TKE} if ctx.training else {},
    )
    return empty_padding(routing, ctx)
