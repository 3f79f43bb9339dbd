"""Shared fixtures: the data folder beside the project (tests that need it skip with a reason), seeds, tiny checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tests run one process per core: threads of their own would only wait for each other

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items):
    no_data = pytest.mark.skip(reason=f"the data folder {SHARED} is not on this machine")
    no_gpu = pytest.mark.skip(reason="no CUDA device on this machine")
    for item in items:
        if "shared" in item.keywords and not SHARED.is_dir():
            item.add_marker(no_data)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The data folder; a test that takes it must be marked `shared`."""
    return SHARED


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


TINY_TEXT = (
    "The router scores every expert for every token, keeps the best two, and weighs what they return. "
    "Ein Modell besteht aus Schichten; нейронные сети учатся. નમસ્તે! def f(x): return x ** 2\n"
)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A data folder of two domains, {text, domain} JSON lines."""
    folder = tmp_path_factory.mktemp("data")
    for domain, step in (("prose", 1), ("code", 3)):
        rows = [{"text": TINY_TEXT[i % 40 :: step] * (1 + i % 3), "domain": domain} for i in range(24)]
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory, tiny_data) -> Path:
    """A byte-level BPE of 300 tokens, trained on the tiny data."""
    from moesaic.training.data import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(tiny_data, 300, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory, tiny_tokenizer) -> Path:
    """A stock Qwen3-MoE checkpoint: 2 layers, 4 experts, top-2, context 64."""
    experts = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    return _tiny(tmp_path_factory.mktemp("tiny-moe"), tiny_tokenizer, "qwen3_moe", **experts)


@pytest.fixture(scope="session")
def tiny_dense(tmp_path_factory, tiny_tokenizer) -> Path:
    return _tiny(tmp_path_factory.mktemp("tiny-dense"), tiny_tokenizer, "qwen3")


def _tiny(folder, tokenizer_folder, kind, **fields) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # On a busy machine, thread hand-over costs models this small more than their work does.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, initializer_range=0.3, eos_token_id=0,
        bos_token_id=None, tie_word_embeddings=True, **fields,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
