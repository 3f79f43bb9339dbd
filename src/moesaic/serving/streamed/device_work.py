"""One experts call computed in two places: on the device from its slots, on the host where an expert's weights lie."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from moesaic.core.routing import Dispatch
from moesaic.kernels import Form
from moesaic.kernels.in_order import InOrder, Piece
from moesaic.kernels.slot_rows import Plan, rows_on
from moesaic.serving.streamed.lossy.mode import keep_pairs

if TYPE_CHECKING:
    from moesaic.serving.streamed.device_tier import DeviceLayer
    from moesaic.serving.streamed.devices import Device


class Work(Protocol):
    """A call under way. Every expert is added once, to one side."""

    def on_device(self, pieces: list[Piece]) -> None: ...
    def on_host(self, pieces: list[Piece]) -> None: ...
    def finish(self) -> Tensor:
        """y [T, D] in x's dtype, on the device."""


class Ordered:
    """In the order of experts, by the CPU kernel on both sides: the bits of the resident model, whatever the policy says."""

    def __init__(self, layer: DeviceLayer, x_TD: Tensor, dispatch: Dispatch) -> None:
        self.layer, self.dtype = layer, x_TD.dtype
        self._sum = InOrder(x_TD, dispatch, layer.weights)

    def on_device(self, pieces: list[Piece]) -> None:
        self._sum.add(pieces, self.layer.weights, self.layer.matrix)

    def on_host(self, pieces: list[Piece]) -> None:
        self._sum.add(pieces, self.layer.below.weights, self.layer.below.matrix)

    def finish(self) -> Tensor:
        return self._sum.finish(self.dtype)


class Gathered:
    """As they come: the device gathers rows of its own experts, the host adds up its share, and both meet at the end."""

    def __init__(self, device: Device, layer: DeviceLayer, x_TD: Tensor, dispatch: Dispatch, host: set[int]) -> None:
        self.device, self.layer, self.x_TD = device, layer, x_TD
        self._rows = rows_on(x_TD, Plan.of(dispatch, device.place), layer.weights, layer.experts)
        self._host: InOrder | None = None
        if not host:
            return
        mine_E = torch.zeros(layer.experts, dtype=torch.bool)
        mine_E[list(host)] = True
        mine_S = mine_E[dispatch.expert_S]
        self._dispatch = keep_pairs(dispatch, mine_S)
        self._start_E = self._dispatch.offsets_E1.tolist()
        self._weights = replace(layer.below.weights, form=layer.host_form)

    def on_device(self, pieces: list[Piece]) -> None:
        self._rows.add(pieces)

    def on_host(self, pieces: list[Piece]) -> None:
        if self._host is None:
            self._host = InOrder(self.device.to_host(self.x_TD), self._dispatch, self._weights, exact=False)
        own = [Piece(e, slot, self._start_E[e], self._start_E[e + 1]) for e, slot, _, _ in pieces]
        self._host.add(own, self._weights, self.layer.below.matrix)

    def finish(self) -> Tensor:
        if self._host is None:
            return self._rows.finish(self.x_TD.dtype)
        wide = torch.promote_types(self.x_TD.dtype, torch.float32)
        theirs_TD = self.device.to_device(self._host.finish(wide))
        return (self._rows.finish(wide) + theirs_TD).to(self.x_TD.dtype)


def host_form(form: Form) -> Form:
    """The same with biases in host memory."""
    biases = (None if bias is None else bias.detach().cpu() for bias in (form.gate_up_bias_EH, form.down_bias_ED))
    gate_up, down = biases
    return replace(form, gate_up_bias_EH=gate_up, down_bias_ED=down)
