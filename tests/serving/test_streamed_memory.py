"""Peak memory: a process that streams a checkpoint of some hundred megabytes stays within its budget, from load to end."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

SLACK = 300 << 20
"""Bytes beyond the budget, the other weights and an interpreter that has torch and transformers imported: for what loading
and generating import and compile, and for activations."""

PROBE = """
import json, sys
import torch, transformers
from transformers import Qwen3MoeForCausalLM
from moesaic.core.sizes import peak_bytes
from moesaic.serving.streamed import load_streamed
from moesaic.view import quiet
torch.set_num_threads(1)
before = peak_bytes()
with quiet(), load_streamed(sys.argv[1], memory=int(sys.argv[2]), dtype=sys.argv[3]) as streamed:
    loaded = peak_bytes()
    other = sum(p.nbytes for p in streamed.model.parameters() if not p.is_meta)
    ids = torch.arange(64)[None]
    streamed.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
    print(json.dumps({"before": before, "loaded": loaded, "end": peak_bytes(), "other": other,
                      "held": streamed.engine.held_bytes, "experts": streamed.engine.shape.total_bytes,
                      "staging": streamed.engine.plan.staging}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """8 layers of 32 experts of 1.5 MiB each (bf16): 384 MiB of experts, 4 MiB of everything else."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("large")
    config = Qwen3MoeConfig(
        vocab_size=300, hidden_size=512, intermediate_size=64, moe_intermediate_size=512, num_hidden_layers=8, num_experts=32,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, num_experts_per_tok=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["auto", pytest.param("float32", marks=pytest.mark.slow)])
def test_peak_memory_stays_within_the_budget(folder, dtype):
    budget = 64 << 20
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder), str(budget), dtype], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["experts"] >= 384 << 20  # all of them would not fit into what is allowed
    assert found["held"] <= budget
    assert found["loaded"] <= found["before"] + found["other"] + SLACK
    assert found["end"] <= found["before"] + budget + found["other"] + SLACK
    assert found["end"] - found["before"] < found["experts"], "a model that was loaded whole would pass this test"
