"""A sweep whose cells train in a second or two."""

from __future__ import annotations

import pytest
import yaml


@pytest.fixture
def sweep_file(tiny_data, tiny_tokenizer, tmp_path):
    """`write(cells=..., grid=..., ...)` writes a sweep file over a tiny base, and returns its path."""
    base = {
        "data": str(tiny_data), "valid": str(tiny_data / "code.jsonl"), "tokenizer": str(tiny_tokenizer),
        "model": {
            "model_type": "moesaic", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "experts": 4,
            "k": 2, "expert_width": 16, "max_position_embeddings": 64,
        },
        "seq_len": 16, "batch_size": 2, "steps": 10, "warmup": 2, "lr": 0.01, "balance": {"switch": 0.01},
        "dtype": "float32", "eval_every": 5, "eval_tokens": 32, "save_every": 3, "log_every": 1, "threads": 1,
    }  # fmt: skip

    def write(**fields):
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({"base": base, "out": str(tmp_path / "sweep"), **fields}))
        return path

    return write
