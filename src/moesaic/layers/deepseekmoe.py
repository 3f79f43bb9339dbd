"""DeepSeekMoE: many small experts plus shared ones."""

from __future__ import annotations

from moesaic.balancing.device import Device
from moesaic.balancing.switch import Switch
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.experts.shared import SharedExperts
from moesaic.layers.moe import MoE


@register("layers", "deepseekmoe", paper="2401.06066", card="layers-and-balancing.md#deepseekmoe")
class DeepSeekMoE(MoE):
    """N experts of `width`, k active, become m N slices of width / m with m k active; S of both are always on.

    So E = m N - S routed experts of which m k - S run, with softmax weights that are not renormalised. Expert loss
    `alpha` (per micro-batch) and device loss `device_alpha` over `devices` groups. Equal total and active
    parameters to the coarse layer; m = 1, S = 0 is plain top-k.
    """

    def __init__(
        self,
        dim: int,
        experts: int = 16,
        k: int = 2,
        width: int | None = None,
        slices: int = 4,
        shared: int = 1,
        alpha: float = 0.01,
        device_alpha: float = 0.0,
        devices: int = 1,
        causal: bool = False,
    ):
        width = dim if width is None else width
        routed, active = slices * experts - shared, slices * k - shared
        if width % slices:
            raise BadInput(f"slices={slices} does not divide the expert width {width}")
        if active < 1:
            raise BadInput(f"shared={shared} leaves none of the {slices * k} active slices to route")
        balance = [Switch(alpha), *([Device(device_alpha, devices)] if device_alpha else [])]
        super().__init__(
            dim,
            routed,
            shared=SharedExperts(dim, width // slices, shared) if shared else None,
            balance=balance,
            causal=causal,
            router_options={"k": active, "convention": "softmax"},
            bank_options={"width": width // slices},
        )
