"""How far a layer's output moves when experts are gone: every expert runs once on every token, every subset only routes.

E experts, T tokens, K slots, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.routing import Routing
from moesaic.surgery.layer import Layer
from moesaic.view.policy import Policy

BATCH = 2048
"""Tokens whose error counts as one norm: norms of batches are added, not their squares."""
CLOSE = 0.05
"""Relative error within which features must be what the layer computes (they may be those of a model in bf16)."""


def never_chosen(dropped: Iterable[int], experts: int, scored: bool = True) -> Policy:
    """The policy under which a router behaves as if these experts' rows were not there.

    Out of the selection, and (`scored`) their logits so low that a softmax over all experts gives them nothing: routers that
    do not renormalise the chosen weights would else keep the old ones.
    """
    gone = list(dropped)
    if not gone:
        return Policy()
    low_E = torch.zeros(experts)
    low_E[gone] = torch.finfo(torch.float32).min / 4
    return Policy(without=gone, logits=low_E if scored else None)


class Reconstruction:
    """A layer on tier C's inputs (evenly thinned out to `tokens`), with its experts' outputs held: 4 T E D bytes.

    Raises BadInput where the layer's output cannot be rebuilt from what its experts saw: the router reads another input,
    or token ids.
    """

    def __init__(self, layer: Layer, tokens: int) -> None:
        facts, block = layer.facts, layer.block
        x_TD, z_TD = layer.features()
        step = max(1, -(-len(x_TD) // tokens))
        x_TD, z_TD = x_TD[::step], z_TD[::step].double()
        if x_TD.shape[1] != block.width:
            raise BadInput(f"{facts.name}: {_OTHER}")
        self.layer, self.experts = layer, facts.experts
        self._scored = True
        self._x_TD = x_TD.to(block.experts.down_proj)
        self._outputs_ETD = torch.stack([layer.run(e, self._x_TD)[1].float() for e in range(facts.experts)])
        try:
            self.target_TD = self.output(())
        except (TypeError, BadInput) as error:
            raise BadInput(f"{facts.name}: {_OTHER} ({error})") from error
        if float((self.target_TD - z_TD).norm()) > CLOSE * float(z_TD.norm()):
            raise BadInput(f"{facts.name}: {_OTHER}")

    def output(self, dropped: Iterable[int]) -> Tensor:
        """What the routed experts give when the router cannot choose `dropped`, float64 [T, D]: its own top-k and weights."""
        gone = list(dropped)
        with torch.no_grad():
            try:
                routing = self._routing(gone)
            except BadInput:
                if not self._scored or not gone:
                    raise
                self._scored = False  # a router whose selection is seen in its logits alone
                routing = self._routing(gone)
        assert routing.experts_TK is not None and routing.weights_TK is not None
        weights_TK = routing.weights_TK.double().masked_fill(routing.experts_TK < 0, 0)
        at_T = torch.arange(len(self._x_TD))
        total_TD = torch.zeros(self._x_TD.shape, dtype=torch.float64)
        for ids_T, weights_T in zip(routing.experts_TK.clamp(min=0).T, weights_TK.T, strict=True):
            total_TD += weights_T[:, None] * self._outputs_ETD[ids_T, at_T]
        return total_TD

    def _routing(self, gone: list[int]) -> Routing:
        return self.layer.block.route_under(never_chosen(gone, self.experts, self._scored), self._x_TD)

    def error(self, dropped: Iterable[int]) -> float:
        """The sum over batches of the Frobenius norm of what changes."""
        moved_TD = self.output(dropped) - self.target_TD
        return sum(float(part.norm()) for part in moved_TD.split(BATCH))

    @property
    def size(self) -> float:
        """The same norm of the output itself."""
        return sum(float(part.norm()) for part in self.target_TD.split(BATCH))


_OTHER = (
    "its output cannot be rebuilt from what its experts saw (its router reads another input), "
    "so subsets of experts cannot be compared here; choose a method that scores experts"
)
