"""Which stock MoE architecture is a dense one with experts, its configuration, and the names of its stored tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moesaic.core.errors import BadInput

DENSE = ("qwen3", "qwen2", "llama", "mistral")
"""Dense architectures that have a stock MoE counterpart here: RMSNorm, then attention; RMSNorm, then a gated FFN."""

FFN = "model.layers.{layer}.mlp.{part}_proj.weight"
"""Of the dense architectures, part: gate, up, down."""


@dataclass(frozen=True)
class Names:
    """Templates of the tensors of one MoE block, as checkpoints of the architecture have them."""

    block: str
    gate: str = "gate.weight"
    expert: str = "experts.{e}.{part}_proj.weight"
    parts: tuple[str, str, str] = ("gate", "up", "down")
    shared: str = "shared_expert.{part}_proj.weight"

    def of_expert(self, layer: int, e: int) -> dict[str, str]:
        """Canonical part (gate, up, down) -> stored name."""
        made = zip(("gate", "up", "down"), self.parts, strict=True)
        return {part: self.block.format(layer=layer) + self.expert.format(e=e, part=own) for part, own in made}

    def of_shared(self, layer: int) -> dict[str, str]:
        return {part: self.block.format(layer=layer) + self.shared.format(part=part) for part in ("gate", "up", "down")}

    def of_router(self, layer: int) -> str:
        return self.block.format(layer=layer) + self.gate

    def other(self, layer: int, name: str) -> str:
        return self.block.format(layer=layer) + name


NAMES = {
    "qwen3_moe": Names("model.layers.{layer}.mlp."),
    "qwen2_moe": Names("model.layers.{layer}.mlp."),
    "mixtral": Names("model.layers.{layer}.block_sparse_moe.", expert="experts.{e}.{part}.weight", parts=("w1", "w3", "w2")),
    "glm4_moe": Names("model.layers.{layer}.mlp.", shared="shared_experts.{part}_proj.weight"),
}

NO_SHARED = 1
"""Width of Qwen2-MoE's shared expert where a method has none; its weights are then 0."""


def kind_for(dense: Any, every: int, normalised: bool, shared: int) -> str:
    """The stock MoE's model type. Raises BadInput where none fits."""
    own = dense.model_type
    if own not in DENSE:
        raise BadInput(f"{own}: no stock MoE is this architecture with experts; one of {', '.join(DENSE)}")
    if own == "qwen3":
        if shared and every > 1:
            raise BadInput(
                f"every={every}: {own} with a shared expert becomes glm4_moe, which has experts in every layer: every=1"
            )
        return "glm4_moe" if shared else "qwen3_moe"
    if own == "qwen2":
        return "qwen2_moe"
    if every == 1 and normalised and not shared:
        return "mixtral"
    if getattr(dense, "sliding_window", None):
        raise BadInput(
            f"{own} with sliding_window={dense.sliding_window} becomes mixtral only: every=1, normalised=true, no shared expert"
        )
    return "qwen2_moe"


def moe_config(
    dense: Any, experts: int, k: int, *, every: int = 1, inner: int | None = None, normalised: bool = True, shared: int = 0
) -> Any:
    """Configuration of the stock MoE that a dense model becomes. Raises BadInput naming what does not fit.

    Args:
        every: experts in every `every`-th layer, the last of each group.
        inner: width of an expert; the FFN's by default.
        normalised: divide the chosen experts' weights by their sum.
        shared: width of an always-on expert; 0 for none.

    Qwen3 becomes Qwen3-MoE, or GLM-4-MoE (sigmoid scores) with a shared expert; Qwen2 becomes Qwen2-MoE; Llama and Mistral
    Mixtral, or, for what Mixtral cannot (dense layers between, weights as they are, a shared expert), Qwen2-MoE without biases.
    """
    from transformers import AutoConfig

    kind, layers = kind_for(dense, every, normalised, shared), dense.num_hidden_layers
    if experts < 1 or not 1 <= k <= experts or not 1 <= every <= layers:
        raise BadInput(
            f"experts={experts}, k={k}, every={every}: this model has {layers} layers, and a token takes 1 to all experts"
        )
    if getattr(dense, "mlp_bias", False):
        raise BadInput(f"{dense.model_type} with mlp_bias: experts of stock MoE architectures have no biases")
    inner = dense.intermediate_size if inner is None else inner
    own = ("model_type", "architectures", "_name_or_path", "mlp_bias", "pretraining_tp")
    fields = {key: value for key, value in dense.to_dict().items() if key not in own}
    fields |= {"num_experts_per_tok": k}
    if kind == "mixtral":
        fields |= {"num_local_experts": experts, "intermediate_size": inner}
        fields.setdefault("sliding_window", None)
    elif kind == "glm4_moe":
        if not normalised and k > 1:
            raise BadInput("normalised=false: glm4_moe scores with sigmoids, which sum to anything: leave it true")
        if shared % inner:
            raise BadInput(f"shared width {shared}: glm4_moe's is a multiple of its experts' width {inner}")
        fields |= {"n_routed_experts": experts, "n_shared_experts": shared // inner, "moe_intermediate_size": inner}
        fields |= {"first_k_dense_replace": 0, "norm_topk_prob": normalised, "use_qk_norm": True, "partial_rotary_factor": 1.0}
        fields |= {"num_nextn_predict_layers": 0, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
    else:
        fields |= {"num_experts": experts, "moe_intermediate_size": inner, "norm_topk_prob": normalised}
        fields |= {"mlp_only_layers": [], "decoder_sparse_step": every}
    if kind == "qwen2_moe":
        biased = dense.model_type == "qwen2" or bool(getattr(dense, "attention_bias", False))
        fields |= {"shared_expert_intermediate_size": shared or NO_SHARED, "qkv_bias": biased}
    return AutoConfig.for_model(kind, **fields)


def moe_layers(config: Any) -> list[int]:
    """Decoder layers of a configuration of `moe_config` that hold experts."""
    every = getattr(config, "decoder_sparse_step", 1)
    return [layer for layer in range(config.num_hidden_layers) if (layer + 1) % every == 0]


def dense_config(moe: Any, inner: int) -> Any:
    """Configuration of the dense model that a stock MoE becomes with one FFN of width `inner` per layer. Raises BadInput."""
    from transformers import AutoConfig

    kinds = {"qwen3_moe": "qwen3", "qwen2_moe": "qwen2", "mixtral": "mistral"}
    if moe.model_type not in kinds:
        raise BadInput(
            f"{moe.model_type}: no stock dense model is this architecture without experts; one of {', '.join(kinds)}"
        )
    kind = "llama" if moe.model_type == "qwen2_moe" and not moe.qkv_bias else kinds[moe.model_type]
    made = AutoConfig.for_model(kind)
    fields = {"head_dim": moe.hidden_size // moe.num_attention_heads, **without_experts(moe.to_dict())}
    return type(made)(**{**fields, "intermediate_size": inner})


def without_experts(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a configuration that say nothing of experts or routers."""
    about = ("expert", "router", "moe", "mlp_only", "sparse_step", "topk", "qkv_bias")
    own = ("model_type", "architectures", "_name_or_path")
    return {key: value for key, value in fields.items() if key not in own and not any(word in key for word in about)}
