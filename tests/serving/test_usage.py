"""What is recorded is what the router chose, and the numbers of balance are those of their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic.serving.describe import choose_threads, describe, widen
from moesaic.serving.generate import Sampling, encode, generate
from moesaic.serving.usage import LayerUsage, Recorder
from moesaic.view import view


@pytest.fixture(scope="module")
def loaded(tiny_moe):
    return AutoModelForCausalLM.from_pretrained(tiny_moe).eval(), AutoTokenizer.from_pretrained(tiny_moe)


def test_records_every_token_that_was_read(loaded):
    model, tokenizer = loaded
    recorder = Recorder(view(model))
    with recorder.recording():
        turn = generate(model, tokenizer, encode(tokenizer, "the router"), Sampling(max_new_tokens=9, temperature=0))
    ids = torch.tensor([[*turn.prompt_ids, *turn.new_ids[:-1]]])
    with torch.no_grad():
        logits = model(input_ids=ids, output_router_logits=True).router_logits
    for usage, logits_TE in zip(recorder.layers(), logits, strict=True):
        values, experts = logits_TE.softmax(-1).topk(2)
        assert torch.equal(usage.experts_TK.long().sort(1).values, experts.sort(1).values)
        mine = usage.weights_TK.sort(1).values
        torch.testing.assert_close(mine, (values / values.sum(1, keepdim=True)).sort(1).values, rtol=1e-4, atol=1e-5)
    model(input_ids=ids)
    assert recorder.layers()[0].experts_TK.shape[0] == ids.shape[1], "nothing is recorded afterwards"


def test_summary_by_value():
    experts_TK = torch.tensor([[0, 1], [0, 2], [0, -1]], dtype=torch.int32)
    row = LayerUsage(3, "m", 4, experts_TK, torch.ones(3, 2)).summary()
    assert row["load"] == [3, 1, 1, 0]
    assert row["experts_used"] == 3
    assert row["max_over_mean"] == pytest.approx(3 / (5 / 4))
    entropy = -(0.6 * math.log(0.6) + 2 * 0.2 * math.log(0.2))
    assert row["entropy"] == pytest.approx(entropy / math.log(4))
    assert row["effective_experts"] == pytest.approx(math.exp(entropy))


def test_describe_counts_active_parameters_and_bytes(loaded):
    model, _ = loaded
    facts = describe(model)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert facts["active_parameters"] == facts["parameters"] - experts // 2
    assert facts["total_bytes"] >= 4 * facts["parameters"]
    assert facts["resident_bytes"] == facts["total_bytes"]
    assert facts["kernels"]


def test_sampling_arguments_reach_generate(loaded):
    assert Sampling(temperature=0).arguments()["do_sample"] is False
    given = Sampling(temperature=0.5, top_k=3, top_p=None, repetition_penalty=1.2).arguments()
    assert given == {"do_sample": True, "temperature": 0.5, "top_k": 3, "repetition_penalty": 1.2}


def test_generation_fills_the_context_and_no_more(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(model.generation_config, "eos_token_id", 100_000)
    prompt = encode(tokenizer, "the router")
    pieces = []
    turn = generate(model, tokenizer, prompt, Sampling(max_new_tokens=500), pieces.append)
    assert turn.stopped == "context full"
    assert len(turn.prompt_ids) + len(turn.new_ids) == 64 == len(turn.times) + len(prompt)
    assert "".join(pieces) == turn.text
    assert turn.times == sorted(turn.times)
    exact = generate(model, tokenizer, prompt, Sampling(max_new_tokens=64 - len(prompt)))
    assert exact.stopped == "max new tokens"
    model.generation_config.eos_token_id = turn.new_ids[5]
    ended = generate(model, tokenizer, prompt, Sampling(max_new_tokens=500))
    assert ended.stopped == "end of text"
    assert ended.new_ids == turn.new_ids[: turn.new_ids.index(turn.new_ids[5]) + 1]


def test_ctrl_c_keeps_what_was_written(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(model.generation_config, "eos_token_id", 100_000)

    def stop(text):
        raise KeyboardInterrupt

    prompt = encode(tokenizer, "the router")
    turn = generate(model, tokenizer, prompt, Sampling(), stop)
    assert turn.stopped == "interrupted"
    assert turn.new_ids


def test_threads_follow_the_model_unless_asked():
    before = torch.get_num_threads()
    small = {"total_bytes": 20_000_000, "parameters": 10, "active_parameters": 3, "device": "cpu"}
    assert choose_threads(small, None)[0] == torch.get_num_threads() == 1
    torch.set_num_threads(before)
    assert choose_threads({**small, "total_bytes": 10**9}, None)[0] == before
    assert choose_threads({**small, "device": "cuda:0"}, None)[0] == before
    assert choose_threads({**small, "total_bytes": 10**9}, 1) == (1, "as asked")
    torch.set_num_threads(before)


def test_widening_keeps_every_value_and_asks_for_room(tiny_moe, monkeypatch):
    from moesaic.serving import describe as module

    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.bfloat16).eval()
    before = [p.clone() for p in model.parameters()]
    monkeypatch.setattr(module, "_free_memory", lambda: 16 * sum(p.numel() for p in before) - 1)
    assert not widen(model)
    assert model.dtype is torch.bfloat16
    monkeypatch.undo()
    assert widen(model)
    assert all(torch.equal(a, b.to(torch.bfloat16)) for a, b in zip(before, model.parameters(), strict=True))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not widen(model), "nothing is left to widen"
