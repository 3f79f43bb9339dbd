"""Tiny dense checkpoints of several architectures, their logits, and a tokenizer."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moesaic.view.load import quiet, resolve_model

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


@pytest.fixture
def dense():
    """dense(kind, seed, **fields) -> a random dense model."""

    def build(kind: str, seed: int = 0, **fields):
        torch.manual_seed(seed)
        own = {"head_dim": 8} if kind != "qwen2" else {}
        config = AutoConfig.for_model(kind, **{**SIZES, **own, **fields})
        model = AutoModelForCausalLM.from_config(config).eval()
        for p in model.parameters():
            p.data = torch.randn_like(p) * 0.2 if p.dim() > 1 else p.data + 0.1 * torch.randn_like(p)
        return model

    return build


@pytest.fixture
def folder(tmp_path, dense):
    """folder(kind, seed, **fields) -> a dense checkpoint, and with `tokenizer` the bundled model's beside it."""

    def write(kind: str, seed: int = 0, tokenizer: bool = False, **fields):
        out = tmp_path / f"{kind}-{seed}-{len(list(tmp_path.iterdir()))}"
        dense(kind, seed, **fields, **({"vocab_size": 8192, "eos_token_id": 0} if tokenizer else {})).save_pretrained(out)
        for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
            shutil.copyfile(resolve_model("bundled") / name, out / name)
        return out

    return write


@pytest.fixture
def logits():
    """logits(folder) of stock transformers on fixed ids."""

    def run(path):
        with quiet(), torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(path)
            ids = torch.randint(1, 90, (3, 11), generator=torch.Generator().manual_seed(2))
            return model(input_ids=ids).logits

    return run


@pytest.fixture
def near():
    """near(a, b) -> |a - b| / |b|."""
    return lambda a, b: float((a - b).norm() / b.norm())
