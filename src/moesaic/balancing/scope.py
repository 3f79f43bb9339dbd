"""Over which tokens a balance loss counts: a sequence, a micro-batch, the data-parallel group, or the global batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope
from moesaic.core.errors import BadInput
from moesaic.core.processes import sum_over_processes
from moesaic.core.recompute import recomputing
from moesaic.core.routing import Routing

SCOPES = ("sequence", "micro_batch", "data_parallel", "global")


class Counting:
    """What the losses of one layer count over; one instance per layer (2501.11873; layers-and-balancing.md#demons).

    - "sequence": the loss of each sequence by itself, averaged;
    - "micro_batch": the tokens of the call;
    - "data_parallel": counts summed over `group` (all processes by default);
    - "global": those, added up over the micro-steps of an optimiser step; `after_step()` empties the buffer. Early
      micro-steps see a part of the batch, the last one all of it.

    Only counts travel. Probabilities stay local: each process has its own term of the mean, so that gradients averaged
    over processes are those of one process with the whole batch. A recomputed forward is given the totals of the first.

    Raises BadInput for another name.
    """

    def __init__(self, name: str = "micro_batch", group: Any = None):
        if name not in SCOPES:
            raise BadInput(f"balance_scope={name!r}: one of {', '.join(SCOPES)}")
        self.name, self.group = name, group
        self._sums: dict[tuple[int, str], Tensor] = {}
        self._call: dict[tuple[int, str], Tensor] = {}

    def scope(self, mask_T: Tensor | None = None, sequence_ids: Tensor | None = None, visit: int = 0) -> Scope:
        """The scope of one call. `visit` tells the routings apart that a layer makes in one forward."""
        if self.name in ("sequence", "micro_batch"):
            return Scope(mask_T, sequence_ids)
        if not recomputing():
            self._call = {key: value for key, value in self._call.items() if key[0] != visit}
        reduce = partial(sum_over_processes, group=self.group)
        return Scope(mask_T, sequence_ids, reduce, partial(self._total, visit))

    def _total(self, visit: int, name: str, counts: Tensor) -> Tensor:
        """Counts over the scope; asked twice in one call, or again under recomputation, it counts once."""
        key = visit, name
        if key not in self._call:
            whole = sum_over_processes(counts.double(), self.group)
            if self.name == "global":
                whole = self._sums[key] = self._sums.get(key, torch.zeros_like(whole)) + whole
            self._call[key] = whole
        return self._call[key]

    def loss(self, balancer: Balancer, routing: Routing, scope: Scope) -> Tensor | None:
        """The balancer's loss within the scope. A sequence that is all padding has none. Raises BadInput without sequences."""
        if self.name != "sequence":
            return balancer.loss(routing, scope)
        if scope.sequence_ids is None:
            raise BadInput("balance_scope=sequence needs sequence_ids: which sequence each token belongs to")
        real_T = torch.ones_like(scope.sequence_ids, dtype=torch.bool) if scope.mask_T is None else scope.mask_T
        parts = []
        for sequence in scope.sequence_ids[real_T].unique().tolist():
            mask_T = real_T & (scope.sequence_ids == sequence)
            value = balancer.loss(routing, scope._replace(mask_T=mask_T))
            if value is None:
                return None
            parts.append(value)
        return torch.stack(parts).mean() if parts else balancer.loss(routing, scope)

    def after_step(self) -> None:
        """Empty the buffer: the optimiser has used what was counted."""
        self._sums.clear()
        self._call.clear()
