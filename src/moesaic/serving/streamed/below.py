"""What lies under a device tier: experts in host memory, kept there by the streaming engine, or all there from the start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.kernels import Form, Weights
from moesaic.kernels.products import Span
from moesaic.serving.streamed.engine import Engine
from moesaic.serving.streamed.layer import records_of
from moesaic.trace.policies import state as S
from moesaic.view import View
from moesaic.view.block import Block
from moesaic.view.implementation import form_of
from moesaic.view.skeleton.fetch import fetch


class HostLayer(Protocol):
    """One block's experts in host memory; `matrix` and `weights` speak of slots there."""

    number: int
    block: Block
    experts: int
    form: Form
    weights: Weights

    def matrix(self, which: int, slot: int) -> Tensor: ...
    def stand_in(self) -> Weights: ...


class Below(Protocol):
    """Where a device tier gets experts from."""

    @property
    def layers(self) -> Sequence[HostLayer]: ...
    @property
    def fixed(self) -> bool:
        """Whether every expert stays where it is: copies need not be waited for before the next ones are asked for."""

    def bring(
        self, layer: Any, tokens: int, experts: np.ndarray, counts: np.ndarray, spans: list[Span]
    ) -> Iterator[list[Span]]:
        """Runs of `spans`, in their order, as (host slot, start, end); a run's slots hold until the next is asked for."""

    def read(self, layer: Any, e: int) -> list[Tensor]:
        """An expert's two matrices, without changing what is kept."""

    def shift(self, layer: Any, which: int, e: int) -> int:
        """Where in a cache line the resident model's matrix begins, in bytes."""

    def memory(self) -> list[Tensor]:
        """What experts are copied from."""

    def reset(self) -> None:
        """Begin anew after an error."""


class Disk:
    """Host memory that the engine fills from disk, within its budget and by its policy. It sees what the device misses."""

    def __init__(self, engine: Engine) -> None:
        if engine.prefetch.active or engine.policy.needs - {"history"}:
            raise BadInput(
                f"policy {engine.policy.entry.name} reads ahead or reads scores: under a device give lru, slru, lfu, …"
            )
        if engine.lossy is not None:
            raise BadInput("lossy modes stream to the CPU only: give no device, or no lossy mode")
        if any(records_of(layer.sources) is not None for layer in engine.layers):
            raise BadInput(
                "experts in few bits are computed by the CPU only: give no device, or a checkpoint that is not rounded"
            )
        self.engine = engine
        self.layers: Sequence[HostLayer] = engine.layers

    @property
    def fixed(self) -> bool:
        return self.engine.plan.staging == 0 and bool(self.engine.policy.state.note[S.ADMIT])

    def bring(
        self, layer: Any, tokens: int, experts: np.ndarray, counts: np.ndarray, spans: list[Span]
    ) -> Iterator[list[Span]]:
        self.engine._begin_pass(layer, tokens)
        return self.engine.bring(layer, tokens, experts, counts).parts(spans, None)

    def read(self, layer: Any, e: int) -> list[Tensor]:
        made = [torch.empty(source.shape, dtype=layer.dtype) for source in layer.sources]
        fetch(self.engine.reader, e, list(zip(layer.sources, made, strict=True))).wait()
        return made

    def shift(self, layer: Any, which: int, e: int) -> int:
        return layer.sources[which].shift(e, layer.dtype)

    def memory(self) -> list[Tensor]:
        if len(self.engine._slots) > 1:  # memory of one size is given back to the system for another's
            return []
        return [raw for slots in self.engine._slots.values() for raw in slots.tensors]

    def reset(self) -> None:
        self.engine.reader.forget()
        self.engine._begin()


class Memory:
    """All experts of a model that is loaded already, in its own stacked parameters, on the CPU."""

    fixed = True

    def __init__(self, view: View) -> None:
        self.layers: Sequence[HostLayer] = [_Stacked(i, block) for i, block in enumerate(view)]

    def bring(
        self, layer: Any, tokens: int, experts: np.ndarray, counts: np.ndarray, spans: list[Span]
    ) -> Iterator[list[Span]]:
        return iter([spans] if spans else [])

    def read(self, layer: Any, e: int) -> list[Tensor]:
        return [layer.matrix(which, e) for which in (0, 1)]

    def shift(self, layer: Any, which: int, e: int) -> int:
        return layer.matrix(which, e).data_ptr() % 64

    def memory(self) -> list[Tensor]:
        return [stack for layer in self.layers for stack in (layer.weights.gate_up, layer.weights.down)]

    def reset(self) -> None:
        pass


class _Stacked:
    """One block's experts in the module's own parameters: slot e holds expert e."""

    def __init__(self, number: int, block: Block) -> None:
        experts = block.experts
        self.number, self.block, self.experts = number, block, block.num_experts
        self.form = form_of(experts)
        gate_up = (experts.gate_up_proj if experts.has_gate else experts.up_proj).detach()
        self.weights = Weights(gate_up, experts.down_proj.detach(), self.form, experts.is_transposed)
        if gate_up.device.type != "cpu" or gate_up.element_size() < 2:
            raise BadInput(f"{block.name}: its experts are {gate_up.dtype} on {gate_up.device}: load them plain, on the CPU")

    def matrix(self, which: int, slot: int) -> Tensor:
        return (self.weights.gate_up, self.weights.down)[which][slot]

    def stand_in(self) -> Weights:
        return self.weights
