"""BAM in a transformers decoder: attention modules as softly routed experts, FFNs as top-1 experts.

Shape legend: B batch, N tokens, D width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moesaic.core.errors import BadInput
from moesaic.layers.moe import MoE

BALANCE = {"switch": 1e-2, "z": 1e-3}
"""Load balance and z loss of the FFN router: the card's choice, the paper gives none."""


class AttentionMixture(nn.Module):
    """sum over ALL experts of g_e attention_e(x), g = softmax(W x): N attentions per token, each with its keys and values.

    With `shared_kv` all use the first one's key and value projections; positions are put on per expert either way. The
    host's cache gets a layer more for every expert but the first.
    """

    def __init__(self, own: Any, config: Any, experts: int, shared_kv: bool, layers: int) -> None:
        super().__init__()
        self.layer_idx = own.layer_idx
        self.score = nn.Linear(config.hidden_size, experts, bias=False)
        places = [self.layer_idx, *(layers + self.layer_idx * (experts - 1) + e for e in range(experts - 1))]
        made = [type(own)(config, layer_idx=self.layer_idx) for _ in places]
        for expert, place in zip(made, places, strict=True):
            expert.layer_idx = place  # in the cache
        self.experts = nn.ModuleList(made)
        for expert in made[1:] if shared_kv else ():
            for name in ("k_proj", "v_proj", "k_norm"):
                if hasattr(expert, name):
                    delattr(expert, name)
                    expert.__dict__[name] = getattr(made[0], name)  # used, and not its own

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        gate_BNE = self.score(hidden_states).float().softmax(-1).to(hidden_states.dtype)
        cache = kwargs.get("past_key_values")
        layers = getattr(cache, "layers", None)
        if layers is not None:
            last = max(expert.layer_idx for expert in self.experts)  # type: ignore[type-var]
            while len(layers) <= last:  # type: ignore[operator]
                layers.append(type(layers[self.layer_idx])())
        y_BND = torch.zeros_like(hidden_states)
        for e, expert in enumerate(self.experts):
            y_BND = y_BND + gate_BNE[..., e : e + 1] * expert(hidden_states=hidden_states, **kwargs)[0]
        return y_BND, None


class FfnMixture(nn.Module):
    """A MoE of ours in the place of the FFN, which keeps its balance losses for the model's."""

    def __init__(self, dim: int, width: int, experts: int, renormalised: bool) -> None:
        super().__init__()
        convention = "renormalised" if renormalised else "softmax"
        self.moe = MoE(
            dim, experts, balance=BALANCE, router_options={"k": 1, "convention": convention}, bank_options={"width": width}
        )
        self.losses: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        y_TD, routing = self.moe(x.reshape(-1, x.shape[-1]))
        self.losses = {key: value for key, value in routing.aux.items() if key.startswith("loss/")}
        return y_TD.reshape(x.shape)


def install(model: Any, spec: dict[str, Any]) -> None:
    """Put both mixtures into every decoder layer. `spec`: experts, shared_kv, renormalised. Raises BadInput."""
    config, stack = model.config, model.get_decoder().layers
    if config.hidden_act not in ("silu", "swish") or getattr(config, "mlp_bias", False):
        raise BadInput(f"bam: FFN experts are SiLU-gated and without biases; {config.base_model_type} is not")
    for layer in stack:
        layer.self_attn = AttentionMixture(layer.self_attn, config, spec["experts"], spec["shared_kv"], len(stack))
        layer.mlp = FfnMixture(config.hidden_size, config.intermediate_size, spec["experts"], spec["renormalised"])
