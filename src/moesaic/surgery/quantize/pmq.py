"""PMQ: bits of each expert by an integer programme over its usage, its gate weight and its measured rounding error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import LinearConstraint, milp
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.kernels.low_bits import GRIDS
from moesaic.surgery.layer import Facts, Layer
from moesaic.surgery.measured import output_error
from moesaic.surgery.quantize.gptq import Gptq
from moesaic.surgery.rounding import WHOLE, Rounder, relative_error, round_expert
from moesaic.view.bank import ExpertWeights

ERRORS = ("moments", "features", "weights")
ROUNDINGS = ("gptq", "nearest")


@register(
    "quantize",
    "pmq",
    paper="2410.06270",
    card="surgery-and-steering.md#mixed-precision-allocation",
    exact=False,
    needs={"R0"},
)
class Pmq(Rounder):
    """Per layer: minimise the sum over experts of usage^alpha * gate^beta * error(bits)^gamma, with a mean of at most `bits`
    bits. Usage and gate weight are shares of the layer, errors too (over experts and widths; of rounding to nearest, whatever
    `rounding` then does); solved by HiGHS. Pruning tokens' experts while running is a routing policy, no surgery.

    The published widths are 1, 2 and 3 with at least one expert at 3 and one at 2 (`spread`); 1 and 3 cannot be packed, so the
    default is what can. In a layer the solver may leave bits unused only where no width is that small.

    Args:
        bits: mean bits per weight of an expert, without scales.
        group: weights of a row that share a scale.
        widths: to choose from, such as "1,2,3".
        alpha, beta, gamma: exponents; 1, 1.5 and 1 are the published code's (its paper has gamma 2).
        error: "moments" (expected error of an expert's output for inputs of the second moment that it saw: R2), "features"
            (measured on recorded tokens that chose it, weighed by their gates, tier C), "weights" (of the weights themselves).
        rounding: "gptq", as published (R2), or "nearest". With error "weights" and "nearest" counts are all it needs.
        spread: at least one expert of each of the two largest widths below 16, as published.
    """

    def __init__(
        self, bits: float = 4, group: int = 64, widths: str = "2,4,8,16", alpha: float = 1.0, beta: float = 1.5,
        gamma: float = 1.0, error: str = "moments", rounding: str = "gptq", spread: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(bits, group)
        try:
            self.widths = tuple(sorted({int(width) for width in str(widths).replace(";", ",").split(",")}))
        except ValueError:
            raise BadInput(f"widths {widths!r}: numbers of bits, such as 2,4,8") from None
        if not set(self.widths) <= {*GRIDS, WHOLE}:
            raise BadInput(f"widths {widths!r}: of {', '.join(map(str, sorted({*GRIDS, WHOLE})))}")
        if bits < min(self.widths):
            raise BadInput(f"bits {bits}: the least of widths {widths!r} is {min(self.widths)}")
        if error not in ERRORS:
            raise BadInput(f"error {error!r}: one of {', '.join(ERRORS)}")
        if rounding not in ROUNDINGS:
            raise BadInput(f"rounding {rounding!r}: one of {', '.join(ROUNDINGS)}")
        self.together = ""  # its programme is a layer's own
        self.by = Gptq(bits, group) if rounding == "gptq" else None
        self.exponents, self.error, self.spread = (alpha, beta, gamma), error, spread
        features = {"C"} if error == "features" else set()
        self.needs = frozenset(features | ({"R2"} if self.by or error == "moments" else set()))

    def look(self, layer: Layer) -> Any:
        """Of each expert its usage and its mean gate weight [E], and errors [E, W]."""
        found, E = layer.statistics, layer.facts.experts
        if self.bits == WHOLE:
            return None
        errors_EW = torch.zeros(E, len(self.widths), dtype=torch.float64)
        for e in range(E):
            own = layer.expert(e)
            for w, bits in enumerate(self.widths):
                if bits == WHOLE:
                    continue
                made = round_expert(own, bits, self.group)
                errors_EW[e, w] = (
                    relative_error(own, made) if self.error == "weights" else output_error(layer, e, made, self.error)
                )
        return found["selection_count"].double(), found.mean("gate"), errors_EW

    def rounded(self, layer: Layer, e: int, bits: int) -> ExpertWeights:
        return super().rounded(layer, e, bits) if self.by is None else self.by.rounded(layer, e, bits)

    def allocate(self, looks: Sequence[Any], blocks: Sequence[Facts]) -> list[list[int]]:
        if self.bits == WHOLE:
            return [[WHOLE] * facts.experts for facts in blocks]
        found = []
        for look in looks:
            cost_EW = self.weight(look)[:, None] * share(look[2]) ** self.exponents[2]
            found.append(solve(cost_EW, self.widths, self.bits, self.spread))
        return found

    def scores(self, look: Any) -> Tensor | None:
        return None if look is None else self.weight(look)

    def weight(self, look: Any) -> Tensor:
        """usage^alpha * gate^beta [E], both as shares of the layer."""
        alpha, beta, _ = self.exponents
        return share(look[0]) ** alpha * share(look[1]) ** beta


def share(values: Tensor) -> Tensor:
    """Each value's part of the sum; equal parts where there is none. A floor keeps an unused expert's error in sight."""
    total = float(values.sum())
    if total <= 0:
        return torch.full_like(values, 1 / values.numel())
    return (values / total).clamp(min=1e-9)


def solve(cost_EW: Tensor, widths: Sequence[int], mean: float, spread: bool = False) -> list[int]:
    """The width of each expert, of least total cost, with the mean of the widths at most `mean`. Raises BadInput."""
    E, W = cost_EW.shape
    cost = (1000 * cost_EW / cost_EW.max().clamp(min=1e-300)).numpy().ravel()
    wide = np.tile(np.asarray(widths, float), E)
    cost = cost - 1e-9 * cost.max() * wide / max(widths)  # what costs nothing is not left out
    limits = [
        LinearConstraint(np.kron(np.eye(E), np.ones(W)), 1, 1),
        LinearConstraint(wide[None], -np.inf, E * mean + 1e-9),
    ]
    below = [width for width in widths if width != WHOLE][-2:]
    for width in below if spread else ():
        limits.append(LinearConstraint((wide == width).astype(float)[None], 1, np.inf))
    found = milp(cost, constraints=limits, integrality=np.ones(E * W), bounds=(0, 1), options={"mip_rel_gap": 0.0})
    if found.x is None:
        raise BadInput(f"bits {mean}: no choice of widths {', '.join(map(str, widths))} has that mean ({found.message})")
    return [int(widths[w]) for w in found.x.reshape(E, W).argmax(1)]
