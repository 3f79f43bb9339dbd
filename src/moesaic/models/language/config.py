"""The configuration of the reference language model: one field per decision, registered names for the methods."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from moesaic.balancing.scope import SCOPES
from moesaic.core.errors import BadInput

PER_CALL = ("task_ids", "modality_ids", "language_ids", "class_ids", "timesteps")
"""What a caller may hand to `forward` for the routers that need it; `gives` promises it."""


class MoesaicConfig(PreTrainedConfig):
    """`AutoConfig.for_model("moesaic", router="adamoe", ...)`; docs/models-reference.md has the table of fields.

    Raises BadInput, naming the field, for values that do not go together. What a router, bank or layer cannot do is
    refused when the model is built, by the method itself.
    """

    model_type = "moesaic"
    keys_to_ignore_at_inference = ["past_key_values", "routings", "balance_losses"]  # noqa: RUF012 (transformers' form)
    attribute_map = {"num_experts": "experts", "num_experts_per_tok": "k", "moe_intermediate_size": "expert_width"}  # noqa: RUF012

    vocab_size: int = 8192
    hidden_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    causal: bool = True
    mask_token_id: int | None = None

    experts: int = 8
    k: int | list[int] | None = None
    expert_width: int | None = None
    intermediate_size: int | None = None
    router: str | None = None
    router_options: dict[str, Any] | None = None
    bank: str | None = None
    bank_options: dict[str, Any] | None = None
    layer: str | None = None
    layer_options: dict[str, Any] | None = None
    balance: dict[str, Any] | None = None
    balance_scope: str = "micro_batch"
    shared_experts: int = 0
    shared_width: int | None = None
    parallel_dense: bool = False
    moe_every: int = 1
    moe_last: int | None = None
    dense_layers: list[int] | None = None
    per_layer: dict[str, dict[str, Any]] | None = None
    gives: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("router_options", "bank_options", "layer_options", "balance", "per_layer"):
            setattr(self, name, dict(getattr(self, name) or {}))
        self.per_layer = {str(index): dict(options) for index, options in (self.per_layer or {}).items()}
        self.dense_layers, self.gives = list(self.dense_layers or []), list(self.gives or [])
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check_shape()
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.expert_width is None:
            self.expert_width = self.hidden_size
        if self.intermediate_size is None:  # SwiGLU with the parameters of a plain MLP of four times the width
            self.intermediate_size = max(8, self.hidden_size * 8 // 3 // 8 * 8)
        if self.shared_width is None:
            self.shared_width = self.expert_width
        self._check_layers()
        super().__post_init__(**kwargs)

    def _check_shape(self) -> None:
        heads, pairs = self.num_attention_heads, self.num_key_value_heads
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name}={getattr(self, name)} must be at least 1")
        if self.head_dim is None and self.hidden_size % heads:
            raise BadInput(f"hidden_size={self.hidden_size} must split into {heads} heads of an even width")
        if (self.head_dim or self.hidden_size // heads) % 2:
            raise BadInput(
                f"hidden_size={self.hidden_size}, head_dim={self.head_dim}: {heads} heads of an even width, which rotary "
                "positions turn in pairs"
            )
        if heads % (pairs or heads):
            raise BadInput(f"num_key_value_heads={pairs} does not divide num_attention_heads={heads}")
        if not self.causal and self.mask_token_id is None:
            raise BadInput("causal=False predicts hidden tokens: name the token that hides them, mask_token_id")

    def _check_layers(self) -> None:
        layers = self.num_hidden_layers
        if self.experts < 0 or self.moe_every < 1:
            raise BadInput(f"experts={self.experts}, moe_every={self.moe_every}: at least 0 experts, in every layer or rarer")
        if self.moe_last is not None and not 0 <= self.moe_last <= layers:
            raise BadInput(f"moe_last={self.moe_last} must be between 0 and num_hidden_layers={layers}")
        for index in self.dense_layers or []:
            if not 0 <= index < layers:
                raise BadInput(f"dense_layers: no layer {index}: there are 0 to {layers - 1}")
        sparse = self.moe_layers()
        if self.balance and not sparse:
            raise BadInput(f"balance: {', '.join(self.balance)} asked for, but no layer of this model has experts")
        if isinstance(self.k, list) and len(self.k) != len(sparse):
            raise BadInput(f"k={self.k}: one entry per MoE layer, of which there are {len(sparse)}: {sparse}")
        for layer in self.per_layer or {}:
            if not layer.isdigit() or int(layer) not in sparse:
                raise BadInput(f"per_layer: {layer!r} is no MoE layer: those are {sparse}")
        if self.balance_scope not in SCOPES:
            raise BadInput(f"balance_scope={self.balance_scope!r}: one of {', '.join(SCOPES)}")
        unknown = sorted(set(self.gives or []) - set(PER_CALL))
        if unknown:
            raise BadInput(f"gives: {', '.join(unknown)}: a caller can give {', '.join(PER_CALL)}; the rest the model gives")

    def moe_layers(self) -> list[int]:
        """Which layers route: every `moe_every`-th (the last of each stretch), of the last `moe_last`, but `dense_layers`."""
        first = 0 if self.moe_last is None else self.num_hidden_layers - self.moe_last
        dense = set(self.dense_layers or [])
        return [
            index
            for index in range(self.num_hidden_layers if self.experts else 0)
            if index >= first and index not in dense and (index + 1) % self.moe_every == 0
        ]
