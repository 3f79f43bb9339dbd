"""Completions, embeddings, models, health, metrics and statistics."""

from __future__ import annotations

import base64
import time

import httpx
import numpy as np
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

BASIC = {"model": "bundled", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}


def complete(server, **fields):
    return server.client().completions.create(**{**BASIC, **fields})


def test_a_completion_is_what_generate_writes(server, bundled):
    model, tokenizer = bundled
    ids = tokenizer(BASIC["prompt"], return_tensors="pt")["input_ids"]
    text = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :])
    answer = complete(server)
    assert answer.choices[0].text == text
    assert "".join(chunk.choices[0].text for chunk in complete(server, stream=True)) == text
    assert complete(server, prompt=ids[0].tolist()).choices[0].text == text, "ids are a prompt too"
    assert answer.usage.prompt_tokens == ids.shape[1]
    assert answer.object == "text_completion"


def test_many_prompts_come_in_order(server):
    prompts = ["Once upon a time", "def f(x):", "It was"]
    answer = complete(server, prompt=prompts, n=2, seed=3, temperature=1)
    assert [choice.index for choice in answer.choices] == list(range(6))
    for i, prompt in enumerate(prompts):
        single = complete(server, prompt=prompt, n=2, seed=3, temperature=1)
        assert [c.text for c in single.choices] == [c.text for c in answer.choices[2 * i : 2 * i + 2]]
    chunks = list(complete(server, prompt=prompts, stream=True, stream_options={"include_usage": True}))
    assert {c.choices[0].index for c in chunks if c.choices} == {0, 1, 2}
    assert chunks[-1].usage.completion_tokens == 24


def test_echo(server):
    assert complete(server, echo=True).choices[0].text == "Once upon a time" + complete(server).choices[0].text
    streamed = "".join(chunk.choices[0].text for chunk in complete(server, echo=True, stream=True))
    assert streamed == complete(server, echo=True).choices[0].text
    with pytest.raises(openai.BadRequestError, match="echo with logprobs"):
        complete(server, echo=True, logprobs=1)


def test_logprobs_of_a_completion(server):
    choice = complete(server, logprobs=2).choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert [choice.text[at:].startswith(t) for at, t in zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True)]
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)
    for token, value, top in zip(
        choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert top[token] == value == max(top.values())


def test_sixteen_tokens_by_default(server):
    assert complete(server, max_tokens=openai.omit).usage.completion_tokens == 16


def test_embeddings(server, bundled):
    client = server.client()
    texts = ["The sea is deep.", "The ocean is deep.", "import numpy as np"]
    answer = client.embeddings.create(model="bundled", input=texts)  # the client asks for base64
    vectors = np.array([row.embedding for row in answer.data])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    plain = server.post("/v1/embeddings", {"model": "bundled", "input": texts}).json()
    np.testing.assert_allclose([row["embedding"] for row in plain["data"]], vectors, atol=1e-6)
    model, tokenizer = bundled
    with torch.no_grad():
        hidden = model.model(**tokenizer(texts[0], return_tensors="pt")).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(vectors[0], torch.nn.functional.normalize(hidden, dim=0), atol=1e-5)
    raw = server.post("/v1/embeddings", {"model": "bundled", "input": "x", "encoding_format": "base64"}).json()
    assert len(base64.b64decode(raw["data"][0]["embedding"])) == 4 * vectors.shape[1]
    assert answer.usage.prompt_tokens == sum(len(tokenizer(t)["input_ids"]) for t in texts)


def test_models(server):
    client = server.client()
    assert [model.id for model in client.models.list()] == ["bundled", "moesaic"]
    assert client.models.retrieve("moesaic").owned_by == "moesaic"
    assert complete(server, model="moesaic").choices[0].text == complete(server).choices[0].text


def test_health_and_shutting_down(tiny, start):
    server = start(*tiny)
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    server.engine.close()
    server.engine.join(10)
    answer = httpx.get(server.url + "/health")
    assert (answer.status_code, answer.json()) == (503, {"status": "dead"})
    refused = server.post("/v1/completions", {"model": "tiny", "prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert refused.headers["retry-after"]


def samples(server):
    text = httpx.get(server.url + "/metrics").text
    return {(s.name, *s.labels.values()): s.value for family in text_string_to_metric_families(text) for s in family.samples}


def test_metrics_count_what_happened(tiny, start):
    server = start(*tiny)
    before = samples(server)
    server.post("/v1/completions", {"model": "tiny", "prompt": "the router", "max_tokens": 5, "ignore_eos": True})
    server.post("/v1/completions", {"model": "no", "prompt": "x"})
    after = samples(server)

    def more(*name):
        return after[name] - before.get(name, 0)

    assert more("moesaic_completion_tokens_total") == 5
    assert more("moesaic_prompt_tokens_total") == len(tiny.tokenizer("the router")["input_ids"])
    assert more("moesaic_jobs_total", "done") == 1
    assert more("moesaic_http_requests_total", "/v1/completions", "200") == 1
    assert more("moesaic_http_requests_total", "/v1/completions", "404") == 1
    assert more("moesaic_time_to_first_token_seconds_count") == 1
    assert more("moesaic_time_between_tokens_seconds_count") == 4
    assert more("moesaic_time_between_tokens_seconds_bucket", "+Inf") == 4
    assert after["moesaic_running_answers",] == 0
    assert after["moesaic_expert_load_max_over_mean", "0"] >= 1


def test_stats_hold_sizes_and_no_text(tiny, start):
    server = start(*tiny)
    server.post("/v1/completions", {"model": "tiny", "prompt": "secret words", "max_tokens": 5, "routing": {"k": 1}})
    time.sleep(1.1)  # the series has full seconds only
    answer = httpx.get(server.url + "/stats")
    stats = answer.json()
    assert "secret" not in answer.text
    (job,) = stats["recent"]
    assert job["steered"] is True
    assert job["state"] == "done"
    assert sum(stats["series"]) == stats["completion_tokens"] == job["completion_tokens"]
    assert [layer["experts"] for layer in stats["load"]] == [4, 4]
    assert all(sum(layer["total"]) > 0 for layer in stats["load"])


def test_two_servers_in_one_process_do_not_mix(tiny, start):
    first, second = start(*tiny), start(*tiny)
    first.post("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 2})
    assert samples(second)["moesaic_completion_tokens_total",] == 0
