"""`--tune` records the text, replays what can run, and runs with what it chose."""

from __future__ import annotations

import json

import pytest
import torch

from moesaic.core.documents import Document
from moesaic.serving.streamed import load_streamed
from moesaic.serving.streamed.tune import SHARES, candidates, choose, link_of, tune
from moesaic.view import quiet

SHORT = ("--max-new-tokens", "4", "--threads", "1", "--no-page")


@pytest.fixture(autouse=True)
def silent():
    with quiet():
        yield


def row(policy, rate, share=1.0, guessed=0):
    return {
        "policy": policy, "tokens_per_second": rate, "cache_bytes": int(100 * share), "cache_share": share,
        "speculative_bytes": guessed,
    }  # fmt: skip


def test_the_fastest_is_chosen_and_of_equals_the_plainest():
    assert choose([row("lru", 5), row("slru", 6)])[0]["policy"] == "slru"
    assert choose([row("fate", 6.02, guessed=9), row("slru", 6), row("lru", 6)])[0]["policy"] == "lru"
    chosen, why = choose([row("slru", 6), row("slru", 6, 0.5), row("lru", 4, 0.5)])
    assert chosen["cache_share"] == 0.5
    assert "lru 4.0" in why


def test_candidates_can_run_live():
    names = {name for name, _ in candidates()}
    assert {"lru", "slru", "lfu", "fate", "moe_infinity", "hybrimoe", "mixtral_offloading", "none"} <= names
    assert not names & {"belady", "read_me", "expertflow", "pre_gated"}


@pytest.mark.parametrize("documents", [None, [Document("the router scores every expert " * 4, "a"), Document("x = 1", "b")]])
def test_tuning_records_replays_and_chooses(documents):
    with load_streamed("bundled", resident=0.3) as streamed:
        found = tune(streamed, [5, 6, 7, 8, 9], documents)
        assert link_of(streamed) > 1e6
        total = streamed.engine.plan.capacity_bytes
    ran = [r for r in found.rows if r["reason"] is None]
    assert found.chosen in ran
    assert {r["cache_bytes"] for r in ran} == {int(share * total) for share in SHARES}
    for r in ran:
        assert r["hit_rate"] <= r["belady_hit_rate"] + 1e-9 or r["speculative_bytes"]
        assert r["tokens_per_second"] > 0
    best = max(r["tokens_per_second"] for r in ran)
    assert found.chosen["tokens_per_second"] >= 0.99 * best
    if documents is None:
        assert len(found.trace) > 30
    json.dumps(found.row())
    assert torch.is_grad_enabled()
