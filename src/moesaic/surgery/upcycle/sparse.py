"""Sparse upcycling: every expert of a new MoE starts as a copy of a dense model's FFN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.conversion import Outcome, Told, ToMoE
from moesaic.surgery.dense import Dense
from moesaic.surgery.gates import STD, Gates
from moesaic.surgery.parts import Part
from moesaic.surgery.stock import moe_config, moe_layers
from moesaic.view.block import View


@register("upcycle", "sparse", paper="2212.05055", card="surgery-and-steering.md#upcycling-baselines")
class Sparse(ToMoE):
    """The FFN of every `every`-th layer (the last of each group) becomes `experts` copies; all else is copied.

    With `normalised` weights (they sum to 1) the new model computes what the dense one does, bit for bit but for the order of
    sums. Without, outputs shrink by the chosen probabilities' sum, as in some of the paper's set-ups. Identical experts only
    part where the router differs between tokens: its rows are random (N(0, 0.02^2)) or come from prompts (`Gates`). The paper
    may copy the optimiser's state, too; checkpoints here have none.
    """

    def __init__(
        self,
        experts: int = 8,
        k: int = 2,
        every: int = 2,
        normalised: bool = True,
        router: str = "random",
        prompts: Any = None,
        seed: int = 0,
    ) -> None:
        self.experts, self.k, self.every, self.normalised = experts, k, every, normalised
        self.gates = Gates(router, experts, prompts, seed)

    def plan(self, models: Sequence[Dense]) -> Outcome:
        config = moe_config(models[0].config, self.experts, self.k, every=self.every, normalised=self.normalised)
        return self.outcome(models, config)

    def prepare(self, models: Sequence[Dense], told: Told) -> None:
        self.gates.prepare(models[0], moe_layers(self.config), told.trust_remote_code)

    def expert(self, models: Sequence[Dense], layer: int, e: int) -> dict[str, Part]:
        return dict(models[0].ffn(layer))

    def router(self, models: Sequence[Dense], layer: int) -> Part:
        return self.gates.part(models[0], layer)


@torch.no_grad()
def sparse(model: Any, experts: int = 8, k: int = 2, every: int = 2, seed: int = 0) -> Any:
    """The same of a live model, with random rows and normalised weights. Raises BadInput."""
    config = moe_config(model.config, experts, k, every=every)
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_config(config, experts_implementation="moesaic").to(dtype=model.dtype, device=model.device)
    dense, blocks = model.state_dict(), View(made)
    random = torch.Generator().manual_seed(seed)
    filled = set()
    for block in blocks:
        prefix = f"{block.name}."
        mlp = {name: dense[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down")}
        for e in range(experts):
            block.bank[e] = mlp
        for name, parameter in block.parent.named_parameters():
            filled.add(prefix + name)
            if "experts." not in name or "shared" in name:
                parameter.zero_()
        weight = next(p for p in block.router.parameters() if p.dim() == 2)
        weight.copy_(STD * torch.randn(weight.shape, generator=random))
    for name, tensor in made.state_dict().items():
        if name in filled:
            continue
        if name not in dense or dense[name].shape != tensor.shape:
            raise BadInput(f"{type(model).__name__} has no {name} of shape {list(tensor.shape)} for {type(made).__name__}")
        tensor.copy_(dense[name])
        filled.add(name)
    left = [name for name in dense if name not in filled and ".mlp." not in name]
    if left:
        raise BadInput(f"{type(made).__name__} has no place for {left[0]} of {type(model).__name__}")
    return made.eval()
