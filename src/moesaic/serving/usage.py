"""Which experts a run used: routing as it happened, layer by layer, and how evenly the work was spread.

Shape legend: L MoE layers, T tokens, K slots per token, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesaic.core.routing import Routing


@dataclass(frozen=True)
class LayerUsage:
    """One MoE layer: the choice of every token that it saw, in order (-1 marks an empty slot)."""

    layer: int
    name: str
    num_experts: int
    experts_TK: Tensor
    weights_TK: Tensor

    @property
    def counts_E(self) -> Tensor:
        chosen = self.experts_TK[self.experts_TK >= 0]
        return torch.bincount(chosen.long(), minlength=self.num_experts)

    def summary(self) -> dict[str, Any]:
        """Experts used, the busiest expert's load over the mean, and the load's entropy (1 = perfectly even)."""
        counts = self.counts_E.double()
        total = counts.sum().item()
        share = counts / max(total, 1)
        nats = -(share[share > 0] * share[share > 0].log()).sum().item()
        return {
            "layer": self.layer,
            "experts_used": int((counts > 0).sum()),
            "experts": self.num_experts,
            "max_over_mean": share.max().item() * self.num_experts,
            "entropy": nats / math.log(self.num_experts) if self.num_experts > 1 else 1.0,
            "effective_experts": math.exp(nats),
            "load": [int(c) for c in counts],
        }


class Recorder:
    """Collects the routing of every block while `recording`; `layers()` joins the calls into one sequence per layer."""

    def __init__(self, blocks: Any) -> None:
        self.blocks = blocks
        self._seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in blocks]
        self.passes = 1
        """A call reads the answer so many times; what the first of them does is kept."""

    def clear(self) -> None:
        for calls in self._seen:
            calls.clear()

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        self.clear()
        handles = [block.on_route(self._keep(calls)) for block, calls in zip(self.blocks, self._seen, strict=True)]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, calls: list[tuple[Tensor, Tensor]]) -> Any:
        def keep(routing: Routing, block: Any) -> None:
            assert routing.experts_TK is not None
            assert routing.weights_TK is not None
            experts_TK, weights_TK = (
                part.detach()[: routing.tokens // self.passes] for part in (routing.experts_TK, routing.weights_TK)
            )
            calls.append((experts_TK.to("cpu", torch.int32), weights_TK.to("cpu", torch.float32)))

        return keep

    def layers(self) -> list[LayerUsage]:
        """One LayerUsage per block that ran; a block that never ran has none."""
        found = []
        for block, calls in zip(self.blocks, self._seen, strict=True):
            if calls:
                experts, weights = (_joined([call[i] for call in calls]) for i in (0, 1))
                found.append(LayerUsage(block.layer, block.name, block.num_experts, experts, weights))
        return found


def _joined(parts: list[Tensor]) -> Tensor:
    """Calls one after another; where a policy widened some, the others get empty slots."""
    width = max(part.shape[1] for part in parts)
    empty = 0 if parts[0].is_floating_point() else -1
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=empty) for part in parts])
