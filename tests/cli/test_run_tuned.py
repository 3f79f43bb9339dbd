"""`moesaic run --tune`, `--lossy` and `--prefetch-bytes`: what they print, their JSON, and bad options in one line."""

from __future__ import annotations

import json

import pytest

SHORT = ("--max-new-tokens", "6", "--threads", "1", "--no-page")


def test_tune_prints_a_table_and_runs_exactly(moesaic, tmp_path):
    plain = json.loads(moesaic("run", "bundled", "the router", "--json", *SHORT).out)
    result = moesaic("run", "bundled", "the router", "--resident", 0.3, "--tune", "--json", *SHORT)
    found = json.loads(result.out)
    assert (found["text"], found["exact"]) == (plain["text"], True)
    assert found["policy"] == found["tune"]["chosen"]["policy"]
    assert {row["policy"] for row in found["tune"]["rows"]} >= {"lru", "slru", "fate"}
    for words in ("belady (the bound)", "tokens/s predicted", "no policy gets above", "timed on this checkpoint"):
        assert words in " ".join(result.err.split())


@pytest.mark.parametrize("mode", ["skip:threshold=0.4", "substitute:first=1+among=8", "defer:experts=1"])
def test_a_lossy_mode_is_labelled_and_measured(moesaic, mode):
    result = moesaic("run", "bundled", "the router", "--resident", 0.3, "--lossy", mode, "--verify", "--json", *SHORT)
    found = json.loads(result.out)
    assert result.code == 0
    assert found["exact"] is False
    assert found["lossy"]["mode"] == mode.split(":")[0]
    assert found["lossy"]["options"]
    assert 0 < found["overlap"] <= 1
    assert found["kl_nats_per_token"] >= 0
    assert found["bits_per_byte_difference"] == pytest.approx(found["bits_per_byte"] - found["bits_per_byte_exact"])
    said = " ".join(result.err.split())
    assert f"no: {mode.split(':')[0]}" in said
    assert "against exact routing" in said


def test_a_neutral_mode_is_exact_and_verified_bit_by_bit(moesaic):
    how = ("--resident", 0.3, "--lossy", "defer:experts=0", "--verify", "--json")
    found = json.loads(moesaic("run", "bundled", "the router", *how, *SHORT).out)
    assert found["exact"] is found["logits_equal"] is found["tokens_equal"] is True
    assert found["overlap"] == 1


def test_prefetch_is_counted(moesaic):
    how = ("--resident", 0.4, "--policy", "mixtral_offloading", "--verify")
    found = json.loads(moesaic("run", "bundled", "the router", *how, "--json", *SHORT).out)
    assert found["logits_equal"] is True
    assert found["prefetched_bytes"] >= found["prefetch_used_bytes"] + found["prefetch_wasted_bytes"] > 0
    none = json.loads(moesaic("run", "bundled", "the router", *how, "--prefetch-bytes", "0B", "--json", *SHORT).out)
    assert (none["prefetched_bytes"], none["text"]) == (0, found["text"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lossy", "skip"), "--lossy is about experts on disk"),
        (("--tune",), "--tune is about experts on disk"),
        (("--prefetch-bytes", "1MB"), "--prefetch-bytes is about experts on disk"),
        (("--resident", 0.4, "--lossy", "guess"), "no lossy method 'guess': one of defer, skip, substitute"),
        (("--resident", 0.4, "--lossy", "skip:much=1"), "--lossy 'skip:much=1': skip has no option"),
        (("--resident", 0.4, "--lossy", "skip:threshold=2"), "threshold 2.0: give a share from 0 to 1"),
        (("--resident", 0.4, "--data", "x.txt"), "--data x.txt is what --tune replays"),
        (("--resident", 0.4, "--tune", "--policy", "slru"), "--tune chooses the policy"),
        (("--resident", 0.4, "--policy", "belady"), "nobody knows it while a model runs"),
    ],
)
def test_bad_options(moesaic, options, words):
    assert words in moesaic("run", "bundled", "the router", *options, *SHORT).complaint


def test_eval_streams_and_scores_a_lossy_mode(moesaic, tiny_data):
    def score(*how):
        result = moesaic(
            "eval", "bundled", "--data", tiny_data, "--context", 32, "--batch-size", 1, "--max-bytes", 200, "--threads", 1, *how
        )
        assert result.code == 0
        return result

    whole = json.loads(score("--json").out)
    exact = json.loads(score("--resident", 0.3, "--json").out)
    lossy = json.loads(score("--resident", 0.3, "--lossy", "skip:threshold=0.45", "--json").out)
    assert exact["bits_per_byte"] == whole["bits_per_byte"]
    assert (exact["exact"], lossy["exact"]) == (True, False)
    assert lossy["bits_per_byte"] != whole["bits_per_byte"]
    assert 0 < lossy["overlap"] < 1
    assert lossy["read_bytes"] < exact["read_bytes"]
    assert "not exact: skip" in " ".join(score("--resident", 0.3, "--lossy", "skip:threshold=0.45").out.split())
    assert (
        "needs all experts in memory"
        in moesaic("eval", "bundled", "--data", tiny_data, "--resident", 0.3, "--quantize", "int8").complaint
    )
