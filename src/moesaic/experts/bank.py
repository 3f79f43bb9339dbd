"""The bank contract: what a MoE layer, surgery, streaming and adapters may ask of a set of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moesaic.core.errors import BadInput
from moesaic.core.routing import Dispatch


class ExpertBank(nn.Module):
    """E experts over width D.

    A subclass gives `forward(x_SD, offsets_E1) -> y_SD` on rows sorted by expert. It may override `run` with a fused
    path (`GatedMLP` does), and `activations` (with `shows_activations = True`) when its experts show a cheap view of
    a token before they are chosen.
    `stacked` names the parameters whose first axis is the expert: they serve `bank[e]`, `bank[e] = ...` and `merge`.
    """

    stacked: tuple[str, ...] = ()
    shows_activations = False
    keyed = False
    """The bank runs the keyed form of a routing, by `run_keyed`."""

    def __init__(self, dim: int, experts: int):
        super().__init__()
        if dim < 1 or experts < 1:
            raise BadInput(f"a bank needs a width and an expert; got dim={dim}, experts={experts}")
        self.dim, self.num_experts = dim, experts
        self.row_to_expert: Tensor | None = None
        """Router row -> stored expert, int64; None when they are the same. Several rows may share one expert."""

    @property
    def cost_E(self) -> Tensor:
        """FLOPs per token of each expert, float32 [E]."""
        return torch.full((self.num_experts,), 2.0 * sum(v.numel() for v in self.peek(0).values()))

    @property
    def bytes_E(self) -> Tensor:
        """Bytes of each expert's own weights, float64 [E]."""
        sizes = [sum(v.numel() * v.element_size() for v in self.peek(e).values()) for e in range(self.num_experts)]
        return torch.tensor(sizes, dtype=torch.float64)

    def forward(self, x_SD: Tensor, offsets_E1: Tensor) -> Tensor:
        raise NotImplementedError

    def run(self, x_TD: Tensor, dispatch: Dispatch, memo: dict[str, Any] | None = None) -> Tensor:
        """Gather, run, weigh, scatter: y [T, D]. `memo` is the call's scratch (RoutingContext.memo)."""
        return dispatch.combine(self(x_TD[dispatch.token_S], dispatch.offsets_E1))

    def run_keyed(self, x_TD: Tensor, gates_T2HN: Tensor) -> Tensor:
        """y [T, D] of the gates of H heads over the N keys of two sides (`Routing.keyed_T2HN`)."""
        raise BadInput(f"{type(self).__name__} has no keyed halves")

    def activations(self, x_TD: Tensor, memo: dict[str, Any]) -> Tensor:
        """The experts' own view of every token, [T, E, ...], kept in `memo` so that `run` can reuse it."""
        raise NotImplementedError(f"{type(self).__name__} shows no activations")

    def merge(self, weights_GE: Tensor) -> ExpertBank:
        """A bank of G experts whose every parameter tensor is the weighted mean of this bank's. Differentiable."""
        return MergedBank(self, weights_GE)

    def __len__(self) -> int:
        return self.num_experts

    def peek(self, e: int) -> dict[str, Tensor]:
        """Expert e's tensors by name, as views of the parameters."""
        self._check(e)
        return {name: getattr(self, name)[e] for name in self.stacked}

    def __getitem__(self, e: int) -> dict[str, Tensor]:
        """A copy of expert e's tensors by name, so that `bank[0], bank[1] = bank[1], bank[0]` swaps."""
        return {name: tensor.detach().clone() for name, tensor in self.peek(e).items()}

    def __setitem__(self, e: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy new weights into expert e. Raises BadInput naming the tensor whose name or shape does not fit."""
        own = self.peek(e)
        if own.keys() != tensors.keys():
            raise BadInput(f"expert {e} has tensors {sorted(own)}; got {sorted(tensors)}")
        for name, value in tensors.items():
            if own[name].shape != value.shape:
                raise BadInput(f"expert {e}, {name}: expected shape {tuple(own[name].shape)}, got {tuple(value.shape)}")
        with torch.no_grad():
            for name, value in tensors.items():
                own[name].copy_(value)

    def _check(self, e: int) -> None:
        if not -self.num_experts <= e < self.num_experts:
            raise IndexError(f"expert {e} of a bank of {self.num_experts}")


class MergedBank(ExpertBank):
    """Parameter averages of another bank, as a bank: gradients flow to the source and to the weights."""

    def __init__(self, source: ExpertBank, weights_GE: Tensor):
        super().__init__(source.dim, weights_GE.shape[0])
        if not source.stacked:
            raise BadInput(f"{type(source).__name__} keeps its experts apart and cannot merge them")
        self.stacked = source.stacked
        self._source = [source]  # in a list: the source's parameters stay its own
        for name in source.stacked:
            parameter = getattr(source, name)
            mixed = weights_GE.float() @ parameter.flatten(1).float()
            setattr(self, name, mixed.view(-1, *parameter.shape[1:]).to(parameter.dtype))

    def forward(self, x_SD: Tensor, offsets_E1: Tensor) -> Tensor:
        tensors = {name: getattr(self, name) for name in self.stacked}
        return functional_call(self._source[0], tensors, (x_SD, offsets_E1))
