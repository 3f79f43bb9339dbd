"""What an expert of this very model costs on the device, on the host and on the way between them, measured in moments.

The figures go into the time model of `trace.hardware`, whose rules decide who computes a miss. Latencies are within them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moesaic.core.routing import Dispatch
from moesaic.kernels import dispatch_slots
from moesaic.kernels.in_order import InOrder, Piece
from moesaic.kernels.slot_rows import Plan, rows_on
from moesaic.trace.hardware import Hardware

if TYPE_CHECKING:
    from moesaic.serving.streamed.device_tier import DeviceTier

MANY = 256
"""Tokens of the case that arithmetic bounds; the other has one token, and reads the weights."""
ROUNDS = 7


def measure(tier: DeviceTier) -> Hardware:
    """The machine as the first layer's first expert finds it. Overwrites slot 0 of the device."""
    device, layer = tier.device, tier.layers[0]
    matrices = tier.below.read(layer.below, 0)
    device.pin(matrices)
    layer.inside[0] = 0
    pairs = [(m, layer.matrix(which, 0)) for which, m in enumerate(matrices)]
    moved = _best(lambda: device.copy(pairs, device.mark()).wait())
    on_device = {n: _best(_on_device(tier, n)) for n in (1, MANY)}
    on_host = {n: _best(_on_host(tier, n, matrices)) for n in (1, MANY)}
    device.unpin()
    device.pin(tier.below.memory())
    size, width = layer.bytes, layer.dtype.itemsize
    flops = 2 * size / width * MANY
    return Hardware(
        f"measured with {device.name}", link_bytes_per_second=size / moved, link_latency_seconds=0.0,
        device_bytes_per_second=size / on_device[1], device_flops=flops / on_device[MANY], device_latency_seconds=0.0,
        host_bytes_per_second=size / on_host[1], host_flops=flops / on_host[MANY], bytes_per_parameter=width,
    )  # fmt: skip


def _best(work: Callable[[], object]) -> float:
    """Seconds of the quickest round."""
    best = float("inf")
    with torch.inference_mode():
        for _ in range(ROUNDS):
            began = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - began)
    return best


def _case(tier: DeviceTier, tokens: int, device: torch.device) -> tuple[Tensor, Dispatch]:
    layer = tier.layers[0]
    x_TD = torch.randn(tokens, layer.weights.model_width).to(layer.dtype).to(device)
    dispatch = dispatch_slots(torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1), layer.experts)
    return x_TD, dispatch


def _on_device(tier: DeviceTier, tokens: int) -> Callable[[], object]:
    layer, place = tier.layers[0], tier.device.place
    x_TD, dispatch = _case(tier, tokens, place)

    def work() -> None:
        rows = rows_on(x_TD, Plan.of(dispatch, place), layer.weights, layer.experts)
        rows.add([Piece(0, 0, 0, tokens)])
        tier.device.read_back([rows.finish(layer.dtype)[:1, :1]])

    return work


def _on_host(tier: DeviceTier, tokens: int, matrices: list[Tensor]) -> Callable[[], object]:
    layer = tier.layers[0]
    x_TD, dispatch = _case(tier, tokens, torch.device("cpu"))
    held = replace(layer.below.stand_in(), gate_up=matrices[0][None], down=matrices[1][None], form=layer.host_form)

    def work() -> None:
        call = InOrder(x_TD, dispatch, held)
        call.add([Piece(0, 0, 0, tokens)], held, lambda which, slot: matrices[which])
        call.finish(layer.dtype)

    return work
