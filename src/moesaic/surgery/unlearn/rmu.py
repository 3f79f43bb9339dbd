"""RMU: on the text to forget, one layer's activations are turned to a random direction; on the rest they stay."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.objective import Batch, Frozen, Given, decoder_layers, layer_output
from moesaic.surgery.unlearning import Unlearning

STEER = 10.0
"""Times the mean norm of the layer's activations: the length of the target where none is given."""


@register("unlearn", "rmu", paper="2403.03218", card="surgery-and-steering.md#seuf--uoe", exact=False)
class RMU(Unlearning):
    """mean (h - c u)^2 on forget tokens + retain_weight mean (h - h_before)^2 on retain tokens, h a layer's output.

    u is a uniform [0, 1) vector of length 1, drawn once from the run's seed. `steer` is c (8,000 for Qwen and 32,000 for
    DeepSeek in SEUF, 6.5 classically): activations differ by orders of magnitude between models, so the default is ten
    times their mean norm on the first batch. By itself it trains the down projections of `layer` and the two below (7 by
    default, or the middle of a shallower model); inside SEUF the layer is the chosen expert's.
    """

    def __init__(self, layer: int | None = None, steer: float | None = None, retain_weight: float = 1200.0) -> None:
        if (steer is not None and steer <= 0) or retain_weight < 0:
            raise BadInput(f"steer={steer}, retain_weight={retain_weight}: a positive length, and no negative weight")
        self.layer, self.steer, self.retain_weight = layer, steer, retain_weight
        if retain_weight == 0:
            self.texts = ("forget",)

    def plan(self, model: Any) -> dict[str, Any]:
        layer = self._layer(model)
        count = len(self.learns(model))
        trains = f"{count} down projections of layers {max(0, layer - 2)} to {layer}"
        return {"stock": True, "reason": "only weights change", "trains": trains}

    def learns(self, model: Any) -> list[nn.Parameter]:
        layer, layers = self._layer(model), decoder_layers(model)
        found = [
            parameter
            for number in range(max(0, layer - 2), layer + 1)
            for name, parameter in layers[number].named_parameters()
            if re.search(r"(^|\.)down_proj(\.weight)?$", name)
        ]
        if not found:
            raise BadInput(f"layers up to {layer} have no down projection for RMU to train")
        return found

    def watch(self, model: Any, parameters: Sequence[nn.Parameter], given: Given, layer: int | None = None) -> None:
        self.frozen = Frozen(parameters)
        self.module = decoder_layers(model)[self._layer(model) if layer is None else layer]
        random = torch.Generator().manual_seed(given.seed)
        u_D = torch.rand(model.config.get_text_config().hidden_size, generator=random)
        self.u_D, self.length = u_D / u_D.norm(), self.steer

    def target(self, model: Any, h_BND: Tensor) -> Tensor:
        """c u [D]."""
        if self.length is None:
            self.length = STEER * h_BND.detach().float().norm(dim=-1).mean().item()
        return self.length * self.u_D.to(h_BND.device)

    def forget(self, model: Any, batch: Batch) -> Tensor:
        h_BND = layer_output(model, self.module, batch["forget"]).float()
        return (h_BND - self.target(model, h_BND)).square().mean()

    def retain(self, model: Any, batch: Batch) -> Tensor | None:
        if self.retain_weight == 0:
            return None
        with self.frozen(model):
            before_BND = layer_output(model, self.module, batch["retain"]).float()
        return (layer_output(model, self.module, batch["retain"]).float() - before_BND).square().mean()

    def state(self) -> dict[str, Tensor]:
        return {} if self.length is None else {"length": torch.tensor(self.length, dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.length = state["length"].item() if "length" in state else self.length

    def facts(self) -> dict[str, Any]:
        return {"steer": self.length}

    def _layer(self, model: Any) -> int:
        count = len(decoder_layers(model))
        if self.layer is None:
            return min(7, count // 2)
        if not 0 <= self.layer < count:
            raise BadInput(f"layer={self.layer}: this model has layers 0 to {count - 1}")
        return self.layer
