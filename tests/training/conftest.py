"""A recipe that trains in seconds."""

from __future__ import annotations

import pytest


@pytest.fixture
def recipe(tiny_data, tiny_tokenizer, tmp_path):
    """Fields of a four-expert model of two layers on the tiny data, twelve steps, two micro-steps each."""
    return {
        "data": str(tiny_data),
        "valid": str(tiny_data / "code.jsonl"),
        "out": str(tmp_path / "run"),
        "tokenizer": str(tiny_tokenizer),
        "model": {
            "model_type": "qwen3_moe", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
            "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True,
        },
        "seq_len": 16, "batch_size": 2, "accumulate": 2, "steps": 12, "warmup": 2, "lr": 0.01,
        "balance": {"switch": 0.01, "z": 0.001}, "dtype": "float32", "experts_implementation": "eager",
        "eval_every": 6, "eval_tokens": 32, "save_every": 4, "log_every": 1,
    }  # fmt: skip
