"""Checkpoints made for benchmarks: random Qwen3-MoE weights of a stated size that route with the locality of a trained model.

Weights drawn as usual route nearly uniformly, and a uniform stream of experts makes every cache look useless. Here the
routing of the model itself has locality, so that every engine that reads the checkpoint meets the same: embeddings are
large against what a layer adds, and attention, with small scores, adds a running mean of what was read. ATTENTION_GAIN
weighs the two. It was set so that LRU caches of 25, 50 and 75 % of the experts hit as often as on the bundled model's own
routing of the same text (docs/streaming-speed.md gives both).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.store.table import INDEX

ATTENTION_GAIN = 1.15
DONE = "generated.json"
"""Written last: a folder without it is not complete."""


@dataclass(frozen=True)
class Size:
    """A Qwen3-MoE by its numbers; one expert is 3 * width * inner weights."""

    width: int = 1024
    inner: int = 512
    layers: int = 12
    experts: int = 64
    slots: int = 8
    heads: int = 16
    kv_heads: int = 4
    head_width: int = 64
    vocabulary: int = 32000

    @property
    def expert_weights(self) -> int:
        return 3 * self.width * self.inner

    @property
    def bank_weights(self) -> int:
        return self.layers * self.experts * self.expert_weights

    @property
    def other_weights(self) -> int:
        """All but experts and norms; the embedding table is not tied to the head."""
        attention = 2 * self.width * self.head_width * (self.heads + self.kv_heads)
        return self.layers * (attention + self.experts * self.width) + 2 * self.vocabulary * self.width

    @property
    def active_weights(self) -> int:
        """Weights that one token reads: its experts, everything else, one row of the embedding table."""
        return self.layers * self.slots * self.expert_weights + self.other_weights - (self.vocabulary - 1) * self.width


SIZES = {
    "tiny": Size(width=64, inner=32, layers=3, experts=16, slots=4, heads=4, kv_heads=2, head_width=16, vocabulary=8192),
    "1.3b": Size(),
    "4.2b": Size(width=2048, inner=1024, layers=10, heads=16, kv_heads=16, head_width=128, vocabulary=50304),
    "6.9b": Size(width=2048, inner=1024, layers=16, heads=16, kv_heads=16, head_width=128, vocabulary=50304),
}
"""Names that `bench` takes; of the last two, OLMoE's layers, 10 of them have 8.1 GB of experts, all 16 12.9 GB."""


def generate(folder: Path, size: Size, progress: Callable[[str], None] = lambda text: None, seed: int = 0) -> Path:
    """Write the checkpoint in bf16, one shard per layer, or keep what is there already if it is this very model.

    Memory stays at one layer. Raises BadInput for a folder that holds something else.
    """
    facts = {"size": vars(size), "gain": ATTENTION_GAIN, "seed": seed}
    if (folder / DONE).is_file():
        if json.loads((folder / DONE).read_text()) == facts:
            return folder
        raise BadInput(f"{folder} holds a checkpoint of another size: name an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    _config(size).save_pretrained(folder)
    random, files = torch.Generator().manual_seed(seed), dict[str, str]()
    total = 0
    for number, shard in enumerate(_shards(size, random)):
        progress(f"writing layer {number} of {size.layers}")
        name = f"model-{number + 1:05}-of-{size.layers + 1:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, name)
        total += sum(tensor.nbytes for tensor in shard.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": files}))
    (folder / DONE).write_text(json.dumps(facts))
    return folder


def _config(size: Size) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        "qwen3_moe", vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=2 * size.width,
        moe_intermediate_size=size.inner, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, head_dim=size.head_width, num_experts=size.experts,
        num_experts_per_tok=size.slots, norm_topk_prob=True, max_position_embeddings=4096, tie_word_embeddings=False,
        dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"], bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def _shards(size: Size, random: torch.Generator) -> Iterator[dict[str, Tensor]]:
    def normal(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        drawn = torch.empty(rows, columns, dtype=torch.bfloat16)
        return drawn.normal_(0, gain / math.sqrt(columns), generator=random)

    def ones(count: int) -> Tensor:
        return torch.ones(count, dtype=torch.bfloat16)

    width, inner, heads, pairs = size.width, size.inner, size.heads * size.head_width, size.kv_heads * size.head_width
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}."
        shard = {
            prefix + "input_layernorm.weight": ones(width),
            prefix + "post_attention_layernorm.weight": ones(width),
            prefix + "self_attn.q_norm.weight": ones(size.head_width),
            prefix + "self_attn.k_norm.weight": ones(size.head_width),
            prefix + "self_attn.q_proj.weight": normal(heads, width),
            prefix + "self_attn.k_proj.weight": normal(pairs, width),
            prefix + "self_attn.v_proj.weight": normal(pairs, width),
            prefix + "self_attn.o_proj.weight": normal(width, heads, ATTENTION_GAIN),
            prefix + "mlp.gate.weight": normal(size.experts, width),
        }
        for e in range(size.experts):
            for name, matrix in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
                shard[f"{prefix}mlp.experts.{e}.{name}_proj.weight"] = normal(*matrix)
        yield shard
    yield {
        "model.embed_tokens.weight": normal(size.vocabulary, width, math.sqrt(width)),
        "model.norm.weight": ones(width),
        "lm_head.weight": normal(size.vocabulary, width),
    }
