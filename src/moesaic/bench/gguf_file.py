"""The same checkpoint as GGUF, for llama.cpp: `python gguf_file.py FOLDER FILE TYPE`, TYPE one of BF16, Q8_0, Q4_0.

Run by an interpreter that has `gguf` (it comes with numpy; torch is not needed). One tensor in memory at a time. Only the
generated Qwen3-MoE checkpoints of this package: no vocabulary is written, tokens are numbers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gguf
import numpy as np


class Checkpoint:
    """Tensors of a folder of safetensors shards as fp32 arrays, read when asked for."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        with open(os.path.join(folder, "model.safetensors.index.json"), encoding="utf-8") as index:
            self.files: dict[str, str] = json.load(index)["weight_map"]
        self.headers: dict[str, tuple[int, dict[str, Any]]] = {}

    def bits(self, name: str) -> np.ndarray:
        """The tensor's bf16 numbers as 16-bit words."""
        path = os.path.join(self.folder, self.files[name])
        if path not in self.headers:
            with open(path, "rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                self.headers[path] = 8 + length, json.loads(stream.read(length))
        base, header = self.headers[path]
        entry = header[name]
        assert entry["dtype"] == "BF16", f"{path}: {name} is {entry['dtype']}"
        first, last = entry["data_offsets"]
        return np.fromfile(path, np.uint16, (last - first) // 2, offset=base + first).reshape(entry["shape"])

    def floats(self, name: str) -> np.ndarray:
        return (self.bits(name).astype(np.uint32) << 16).view(np.float32)

    def stacked(self, names: list[str]) -> np.ndarray:
        return np.stack([self.floats(name) for name in names])


def experts_of(config: dict[str, Any]) -> int:
    return config.get("num_local_experts") or config["num_experts"]


def tensors(held: Checkpoint, config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], bool, Callable[[], np.ndarray]]]:
    """(GGUF name, shape, whether it stays fp32, its fp32 numbers) in the order of the file."""
    experts, width, inner = experts_of(config), config["hidden_size"], config["moe_intermediate_size"]

    def plain(name: str, wanted: str, exact: bool = False):
        return wanted, held.bits(name).shape, exact, partial(held.floats, name)

    yield plain("model.embed_tokens.weight", "token_embd.weight")
    yield plain("model.norm.weight", "output_norm.weight", True)
    yield plain("lm_head.weight", "output.weight")
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{layer}.", f"blk.{layer}."
        for name, wanted in (
            ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"), ("self_attn.q_norm", "attn_q_norm"),
            ("self_attn.k_norm", "attn_k_norm"), ("mlp.gate", "ffn_gate_inp"),
        ):  # fmt: skip
            yield plain(f"{theirs}{name}.weight", f"{ours}{wanted}.weight", True)
        for name, wanted in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("o", "attn_output")):
            yield plain(f"{theirs}self_attn.{name}_proj.weight", f"{ours}{wanted}.weight")
        for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
            stacked = [f"{theirs}mlp.experts.{e}.{name}_proj.weight" for e in range(experts)]
            yield (
                f"{ours}ffn_{name}_exps.weight",
                (experts, *shape),
                False,
                partial(held.stacked, stacked),
            )


def write(folder: str, path: str, kind: str) -> None:
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as stream:
        config = json.load(stream)
    held, stored = Checkpoint(folder), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_expert_count(experts_of(config))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    full = gguf.GGMLQuantizationType.F32
    listed = list(tensors(held, config))
    for name, shape, exact, _ in listed:
        kind_here = full if exact else stored
        block, size = gguf.GGML_QUANT_SIZES[kind_here]
        count = int(np.prod(shape))
        if exact:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * count)
        else:
            held_shape = gguf.quant_shape_to_byte_shape(shape, kind_here)
            writer.add_tensor_info(name, held_shape, np.dtype(np.uint8), count // block * size, raw_dtype=kind_here)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, exact, read in listed:
        writer.write_tensor_data(read() if exact else gguf.quants.quantize(read(), stored))
    writer.close()


if __name__ == "__main__":
    folder, path, kind = sys.argv[1:]
    write(folder, path + ".partial", kind)
    os.replace(path + ".partial", path)
