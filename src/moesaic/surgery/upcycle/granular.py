"""Granular upcycling: experts are shards of a dense model's FFN, and the shards of one copy are routed to together at first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.conversion import Outcome, Told, ToMoE, chosen
from moesaic.surgery.dense import Dense
from moesaic.surgery.gates import Gates
from moesaic.surgery.parts import Part
from moesaic.surgery.stock import moe_config, moe_layers

SCALES = ("down", "cube_root")


@register("upcycle", "granular", paper="2410.07524", card="surgery-and-steering.md#upcycling-baselines")
class Granular(ToMoE):
    """The FFN is cut into `granularity` shards, dealt out `experts / granularity` times: expert e is shard e mod G of a copy.

    A copy's shards share one router row ("virtual group"), so that with `k` a multiple of G they enter together and their sum
    is the FFN. The weight of a group is divided among G, so outputs are scaled by G (with weights not `normalised`: by
    R * G^2 / k for R copies, which is exact only where all probabilities are equal). `scale: down` puts that on down_proj
    alone, which is exact for gated units. The released code multiplies all three matrices by its cube root (`cube_root`),
    which is right for squared ReLU, and about a tenth off for SwiGLU.
    """

    def __init__(
        self,
        granularity: int = 4,
        experts: int = 16,
        k: int = 4,
        every: int = 1,
        normalised: bool = True,
        scale: str = "down",
        router: str = "random",
        prompts: Any = None,
        seed: int = 0,
    ) -> None:
        if granularity < 1 or experts % granularity:
            raise BadInput(f"granularity={granularity}: {experts} experts are not a whole number of groups of {granularity}")
        if k % granularity:
            raise BadInput(f"k={k}: the {granularity} shards of a copy enter together: make k a multiple of {granularity}")
        if scale not in SCALES:
            raise BadInput(f"scale={scale!r}: one of {', '.join(SCALES)}")
        self.granularity, self.experts, self.k, self.every = granularity, experts, k, every
        self.normalised, self.scale, self.copies = normalised, scale, experts // granularity
        self.gates = Gates(router, self.copies, prompts, seed)

    def plan(self, models: Sequence[Dense]) -> Outcome:
        inner, cuts = models[0].config.intermediate_size, self.granularity
        if inner % cuts:
            near = sorted((n for n in range(1, inner + 1) if inner % n == 0), key=lambda n: abs(n - cuts))[:2]
            raise BadInput(
                f"granularity={cuts}: an FFN of {inner} neurons has no {cuts} equal shards, but {' or '.join(map(str, near))}"
            )
        config = moe_config(
            models[0].config, self.experts, self.k, every=self.every, inner=inner // cuts, normalised=self.normalised
        )
        return self.outcome(models, config)

    def prepare(self, models: Sequence[Dense], told: Told) -> None:
        self.gates.prepare(models[0], moe_layers(self.config), told.trust_remote_code)

    @property
    def factor(self) -> float:
        """What an output is to be scaled by."""
        G = self.granularity
        return float(G) if self.normalised else self.copies * G * G / self.k

    def expert(self, models: Sequence[Dense], layer: int, e: int) -> dict[str, Part]:
        ffn, dense = models[0].ffn(layer), models[0]
        inner = ffn["gate"].shape[0] // self.granularity
        first = e % self.granularity * inner
        index = torch.arange(first, first + inner)
        on_all = self.factor ** (1 / 3) if self.scale == "cube_root" else 1.0
        on_down = on_all if self.scale == "cube_root" else self.factor
        return {
            "gate": chosen(ffn["gate"], 0, index, dense, on_all), "up": chosen(ffn["up"], 0, index, dense, on_all),
            "down": chosen(ffn["down"], 1, index, dense, on_down),
        }  # fmt: skip

    def router(self, models: Sequence[Dense], layer: int) -> Part:
        return self.gates.part(models[0], layer, repeat=self.granularity)
