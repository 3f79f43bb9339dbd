"""Sparse upcycling: every expert of a new MoE starts as a copy of a dense model's FFN."""

from __future__ import annotations

from typing import Any

import torch

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.view.block import View

KINDS = {"qwen3": "qwen3_moe", "qwen2": "qwen2_moe", "llama": "mixtral", "mistral": "mixtral"}
"""Dense architecture -> the stock MoE that is it with experts."""

ROUTER_STD = 0.02


@register("upcycle", "sparse", paper="2212.05055", card="surgery-and-steering.md#upcycling-baselines")
@torch.no_grad()
def sparse(model: Any, experts: int = 8, k: int = 2, every: int = 2, seed: int = 0) -> Any:
    """A stock MoE whose FFN in every `every`-th layer (the last of each group) is `experts` copies; all else is copied.

    Router rows are N(0, 0.02^2). Weights of the chosen are divided by their sum, so that the new model computes what the
    dense one does. Qwen3 becomes Qwen3-MoE, Qwen2 Qwen2-MoE (its shared expert has width 1 and weights 0), Llama and
    Mistral Mixtral, which has experts in every layer (`every` 1). Raises BadInput for another architecture or biases that
    the target lacks.
    """
    config = build_config(model.config, experts, k, every)
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
        weight.copy_(ROUTER_STD * torch.randn(weight.shape, generator=random))
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


def build_config(dense: Any, experts: int, k: int, every: int) -> Any:
    """Configuration of the MoE that a dense one becomes. Raises BadInput naming what does not fit."""
    from transformers import AutoConfig

    kind = KINDS.get(dense.model_type)
    if kind is None:
        raise BadInput(f"{dense.model_type}: no stock MoE is this architecture with experts; one of {', '.join(KINDS)}")
    if experts < 2 or not 1 <= k <= experts or not 1 <= every <= dense.num_hidden_layers:
        raise BadInput(f"experts={experts}, k={k}, every={every}: this model has {dense.num_hidden_layers} layers")
    if kind == "mixtral" and every != 1:
        raise BadInput(f"every={every}: {dense.model_type} becomes mixtral, which has experts in every layer: every=1")
    own = ("model_type", "architectures", "_name_or_path")
    fields = {key: value for key, value in dense.to_dict().items() if key not in own}
    inner = dense.intermediate_size
    if kind == "mixtral":
        fields |= {"num_local_experts": experts}
    else:
        fields |= {"num_experts": experts, "moe_intermediate_size": inner, "norm_topk_prob": True, "mlp_only_layers": []}
        fields |= {"decoder_sparse_step": every}
    if kind == "qwen2_moe":
        fields |= {"shared_expert_intermediate_size": 1, "qkv_bias": True}
    return AutoConfig.for_model(kind, **{**fields, "num_experts_per_tok": k})
