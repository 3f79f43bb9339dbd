"""`moesaic run --memory | --resident`: the same text from less memory, its numbers, and every bad option in one line."""

from __future__ import annotations

import json

import pytest

SHORT = ("--max-new-tokens", "8", "--threads", "1", "--no-page")


def test_streamed_text_is_the_resident_text(moesaic, tiny_moe):
    whole = json.loads(moesaic("run", tiny_moe, "the router", "--json", *SHORT).out)
    for how in (("--resident", 0.5), ("--memory", "4kB"), ("--resident", 1, "--policy", "slru", "--page-cache", "keep")):
        result = moesaic("run", tiny_moe, "the router", "--json", *how, *SHORT)
        found = json.loads(result.out)
        assert result.code == 0
        assert (found["text"], found["exact"], found["total_bytes"]) == (whole["text"], True, whole["total_bytes"])
        assert set(whole) < set(found)
        assert 0 <= found["hit_rate"] < 1
        assert found["read_bytes"] > 0
        assert found["stall_seconds"] > 0
        assert found["peak_bytes"] > 1 << 20
        assert found["hits"] + found["loads"] + found["streamed"] == found["accesses"]
    assert found["expert_resident_bytes"] <= found["expert_total_bytes"] + 8 * 2 * 128
    assert found["policy"] == "slru"
    assert found["page_cache"] == "keep"


def test_less_memory_is_what_it_says(moesaic, tiny_moe):
    found = json.loads(moesaic("run", tiny_moe, "the router", "--json", "--resident", 0.25, *SHORT).out)
    assert found["memory_bytes"] == found["expert_total_bytes"] // 4
    assert found["resident_bytes"] < found["total_bytes"]


def test_verify_says_equal(moesaic):
    result = moesaic("run", "bundled", "the router", "--resident", 0.4, "--verify", *SHORT)
    assert result.code == 0
    for words in ("hit rate", "logits of the streamed and the resident model: equal", "tokens of the streamed"):
        assert words in result.out
    found = json.loads(
        moesaic("run", "bundled", "the", "--resident", 0.1, "--policy", "none", "--verify", "--json", *SHORT).out
    )
    assert found["logits_equal"] is found["tokens_equal"] is True


def test_verify_can_fail(moesaic, tiny_moe, monkeypatch):
    from moesaic.kernels import waves

    run = waves.run
    monkeypatch.setattr(waves, "run", lambda *args: run(*args) * 1.01)
    result = moesaic("run", tiny_moe, "the router", "--resident", 0.5, "--verify", "--json", *SHORT)
    assert result.code == 1
    assert json.loads(result.out)["logits_equal"] is False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--memory", "1GiB", "--resident", 0.4), "give --memory 1GiB or --resident 0.4, not both"),
        (("--memory", "lots"), "--memory 'lots' is no size"),
        (("--memory", "0"), "--memory 0: give more than 0 bytes"),
        (("--memory", "100"), "a budget of 100 B is too small: one expert to stream through takes 1.5 KiB (1536 bytes)"),
        (("--resident", 0), "--resident 0: give a share above 0, at most 1"),
        (("--resident", 1.5), "--resident 1.5: give a share above 0, at most 1"),
        (("--resident", "nan"), "--resident nan: give a share"),
        (("--resident", 0.5, "--policy", "best"), "no policies method 'best': one of belady"),
        (("--resident", 0.5, "--policy", "lru:size=3"), "lru has no option 'size=3'"),
        (("--resident", 0.5, "--policy", "belady"), "policy belady needs future, which a running model does not give"),
        (("--resident", 0.5, "--page-cache", "fast"), "--page-cache 'fast': one of direct, keep, drop"),
        (("--resident", 0.5, "--experts", "eager"), "--experts eager needs all experts in memory"),
        (("--policy", "slru"), "--policy is about experts on disk: give --memory or --resident"),
        (("--verify",), "--verify is about experts on disk"),
    ],
)
def test_bad_options_are_one_line(moesaic, tiny_moe, options, words):
    result = moesaic("run", tiny_moe, "x", *options, *SHORT)
    assert words in result.complaint
    assert result.out == ""


def test_a_dense_model_and_a_truncated_one(moesaic, tiny_dense, tiny_moe, tmp_path):
    import shutil

    assert "no Mixture-of-Experts block" in moesaic("run", tiny_dense, "x", "--resident", 0.5, *SHORT).complaint
    shutil.copytree(tiny_moe, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    complaint = moesaic("run", tmp_path / "cut", "x", "--resident", 0.5, *SHORT).complaint
    assert "model.safetensors is truncated: tensor" in complaint
