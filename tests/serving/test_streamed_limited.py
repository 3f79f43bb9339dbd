"""A control group that kills who takes too much: `moesaic run` streams inside it and writes what the resident model does."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from moesaic.bench import generated
from moesaic.bench.memory_limit import MemoryLimit
from moesaic.view import load, quiet

SIZE = generated.Size(width=512, inner=512, layers=8, experts=40, slots=2, heads=4, kv_heads=2, head_width=64, vocabulary=8192)
"""503 MB of experts."""

SLACK = 300 << 20
"""Beyond the budget, the other weights and what an interpreter with torch and transformers takes."""

BARE = """
import torch, transformers
from transformers import Qwen3MoeForCausalLM
from moesaic.core.sizes import peak_bytes
print(peak_bytes())
"""


def run(*command, limit=None):
    words = [sys.executable, "-c", *command]
    done = subprocess.run(limit.prefixed(words) if limit else words, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_run_in_limited_memory_writes_what_the_resident_model_writes(tmp_path):
    why = MemoryLimit.unavailable()
    if why:
        pytest.skip(why)
    folder = generated.generate(tmp_path / "model", SIZE)
    with quiet():
        load("bundled").tokenizer.save_pretrained(folder)
    bare = int(run(BARE)[1])
    experts = 2 * SIZE.bank_weights
    budget = experts // 4
    assert 0.75 * experts > SLACK, "the whole model would fit into the limit"
    arguments = ["run", str(folder), "Once upon a time", "--json", "--no-page", "--temperature", "0", "--threads", "1"]
    arguments += ["--max-new-tokens", "12"]
    command = "import sys; from moesaic.cli.main import main; main(sys.argv[1:])"
    code, out, err = run(command, *arguments)
    assert code == 0, err[-2000:]
    expected = json.loads(out)
    with MemoryLimit(budget + 2 * SIZE.other_weights + SLACK + bare) as limit:
        code, out, err = run(command, *arguments, "--memory", str(budget), limit=limit)
        peak = limit.peak_bytes
    assert code == 0, (code, peak, err[-2000:])
    found = json.loads(out)
    print({"limit": limit.nbytes, "group_peak": peak, "process_peak": found["peak_bytes"], "bare": bare})
    assert (found["text"], found["tokens"], found["exact"]) == (expected["text"], 12, True)
    assert found["expert_total_bytes"] == experts and found["memory_bytes"] == budget
