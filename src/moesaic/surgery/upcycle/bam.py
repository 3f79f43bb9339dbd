"""BAM: attention and FFNs of several specialised dense models become experts, attention softly and FFNs top-1 routed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.conversion import Told
from moesaic.surgery.dense import Dense
from moesaic.surgery.gates import STD
from moesaic.surgery.living import Living, averaged, build, opened


@register("upcycle", "bam", paper="2408.08274", card="surgery-and-steering.md#bam", exact=False)
class BAM(Living):
    """Per layer: y = sum over all i of a_i(x) Attn_i + g_top1(x) FFN_top1, a = softmax; embeddings, norms and head are means.

    With `shared_kv` keys and values are projected once, by the models' mean. Name the seed among the models: the paper finds
    that its expert matters. Routers are N(0, 0.02^2). `renormalised` gives the one FFN weight 1, so that equal models give that
    model; the paper's raw probability shrinks the branch at first, and lets the router learn from the loss. Where the dense
    architecture has attention and FFN one after the other (Llama, Qwen), so has the result; the paper's are side by side.
    """

    least, most = 2, 64

    def __init__(self, shared_kv: bool = False, renormalised: bool = False, seed: int = 0) -> None:
        self.shared_kv, self.renormalised, self.seed = shared_kv, renormalised, seed

    def spec(self, models: Sequence[Dense]) -> dict[str, Any]:
        config = models[0].config
        if config.hidden_act not in ("silu", "swish") or getattr(config, "mlp_bias", False):
            raise BadInput(f"bam: its FFN experts are SiLU-gated and without biases; {config.model_type} here is not")
        models[0].ffn(0)
        return {
            "method": "bam", "experts": len(models), "shared_kv": self.shared_kv, "renormalised": self.renormalised,
        }  # fmt: skip

    @torch.no_grad()
    def make(self, models: Sequence[Dense], told: Told) -> Any:
        states = [opened(model).state_dict() for model in models]
        made = build(models, self.spec(models))
        random = torch.Generator().manual_seed(self.seed)
        filled = dict(made.state_dict())
        for name, tensor in filled.items():
            if name in states[0]:
                tensor.copy_(averaged(states, name))
            elif ".self_attn.score." in name:
                tensor.copy_(STD * torch.randn(tensor.shape, generator=random))
            elif ".self_attn.experts." in name:
                prefix, _, rest = name.partition(".self_attn.experts.")
                e, _, leaf = rest.partition(".")
                own = f"{prefix}.self_attn.{leaf}"
                shared = self.shared_kv and leaf.split(".")[0] in ("k_proj", "v_proj", "k_norm")
                tensor.copy_(averaged(states, own) if shared else states[int(e)][own])
        for at, layer in enumerate(made.get_decoder().layers):
            for e, state in enumerate(states):
                own = f"model.layers.{at}.mlp."
                gate, up, down = (state[f"{own}{part}_proj.weight"] for part in ("gate", "up", "down"))
                layer.mlp.moe.bank[e] = {"gate_up_EHD": torch.cat([gate, up]), "down_EDI": down}
            for parameter in layer.mlp.moe.router.parameters():
                parameter.copy_(STD * torch.randn(parameter.shape, generator=random))
        return made
