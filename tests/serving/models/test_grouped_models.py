"""The card's experiment with models that write: six of them, room for two, a Zipf stream, queue windows of 1, 8 and 64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moesaic.serving.models.cache import CachedModel, ModelCache, Tier
from moesaic.serving.models.queue import serve_grouped
from moesaic.serving.models.simulate import Request, simulate

NAMES = "abcdef"
REQUESTS = 128


def bytes_of(model):
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Six stock Qwen3-MoE checkpoints of equal size."""
    from transformers import AutoConfig, AutoModelForCausalLM

    found = {}
    for number, name in enumerate(NAMES):
        torch.manual_seed(number)
        config = AutoConfig.for_model(
            "qwen3_moe", vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=64, initializer_range=0.3, moe_intermediate_size=8,
            num_experts=4, num_experts_per_tok=2,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        found[name] = tmp_path_factory.mktemp(name), bytes_of(model)
        model.save_pretrained(found[name][0])
    return found


def greedy(model, prompt):
    with torch.inference_mode():
        out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=3, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_grouping_cuts_switches_and_changes_no_answer(checkpoints):
    from moesaic.view import load

    share = 1 / np.arange(1, 7)
    rng = np.random.default_rng(0)
    stream = [str(name) for name in rng.choice(list(NAMES), REQUESTS, p=share / share.sum())]
    prompts = rng.integers(1, 64, (REQUESTS, 5)).tolist()
    size = max(size for _, size in checkpoints.values())

    def read(name):
        return load(checkpoints[name][0], dtype="float32").model

    answers, switches = {}, {}
    for window in (1, 8, 64):
        known = [CachedModel(name, size, lambda name=name: read(name), bytes_of) for name in NAMES]
        cache = ModelCache(known, [Tier("ram", 2 * size)])

        def run(name, requests, cache=cache):
            with cache.use(name) as model:
                return [greedy(model, prompts[i]) for i in requests]

        answers[window] = serve_grouped(stream, cache.residencies[0], run, window=window)
        switches[window] = cache.stats[0].loads
        assert cache.stats[0].most_bytes <= 2 * size
        simulated = simulate([Request(name) for name in stream], dict.fromkeys(NAMES, size), 2 * size, window=window)
        assert simulated.switches == switches[window]
    assert answers[1] == answers[8] == answers[64]
    assert len(set(map(tuple, answers[1]))) > 1
    assert switches[1] > 2 * switches[8] > 2 * switches[64]
