"""Tier B: how much the loss depends on each expert parameter, from one backward pass per sequence.

`fisher.NAME_sum` adds (dL/dW)^2 and `taylor.NAME_sum` |W dL/dW| over sequences; L is a sequence's mean next-token loss.
Squares of gradients do not add over a batch, so sequences go one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.trace.calibration.tiers import Statistics
from moesaic.view import View


class Backward:
    """Leaves only the experts and routers of some layers trainable inside `with`; `step` adds one sequence."""

    def __init__(self, blocks: View, layers: Sequence[int]) -> None:
        self.model, self.blocks = blocks.model, blocks
        self.parameters: dict[int, dict[str, nn.Parameter]] = {}
        for layer in layers:
            block = blocks[layer]
            named = [(name, p) for name, p in block.experts.named_parameters()]
            if block.router is not None:
                named += [(f"router.{name}", p) for name, p in block.router.named_parameters()]
            self.parameters[layer] = {name: p for name, p in named if p.is_floating_point()}
        self.sums: dict[int, Statistics] = {layer: {} for layer in layers}

    def __enter__(self) -> Backward:
        self._before = {p: p.requires_grad for p in self.model.parameters()}
        wanted = {id(p) for named in self.parameters.values() for p in named.values()}
        for p in self._before:
            p.requires_grad_(id(p) in wanted)
        return self

    def __exit__(self, *_: object) -> None:
        for p, learns in self._before.items():
            p.requires_grad_(learns)
            p.grad = None

    def step(self, ids_N: Tensor) -> float:
        """One sequence [N]: its loss."""
        ids_BN = ids_N[None].to(next(self.model.parameters()).device)
        if ids_BN.shape[1] < 2:
            return 0.0
        with torch.enable_grad():
            output: Any = self.model(input_ids=ids_BN, use_cache=False)
            loss = nn.functional.cross_entropy(output.logits[0, :-1].float(), ids_BN[0, 1:])
            loss.backward()
        for layer, named in self.parameters.items():
            found = self.sums[layer]
            one = torch.tensor(1.0, dtype=torch.float64)
            found["sequence_count"] = found.get("sequence_count", torch.zeros_like(one)) + one
            for name, p in named.items():
                grad = torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.float()
                for kind, value in (("fisher", grad.square()), ("taylor", (grad * p.detach().float()).abs())):
                    key = f"{kind}.{name}_sum"
                    found[key] = value if key not in found else found[key].add_(value)
                p.grad = None
        return float(loss.detach())
