"""Prefetch in a running model: the same bits under every policy, the replay's counts, and guesses that harm nobody."""

from __future__ import annotations

import errno
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import moesaic
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.core.registry import entries
from moesaic.serving.streamed import load_streamed
from moesaic.serving.streamed import stats as C
from moesaic.serving.streamed.wave import Wave
from moesaic.store import Reader, ReadFailed
from moesaic.trace import simulate as sim
from moesaic.trace.hardware import Hardware
from moesaic.trace.replay import history_of, replay
from moesaic.trace.sweep import build
from moesaic.view import load, quiet

ONLY_REPLAYED = {"belady", "read_me", "expertflow", "pre_gated", "llama_cpp"}
GUESSING = ["fate:shallow=0", "fate:shallow=0+extra=1+ahead=2", "mixtral_offloading", "hybrimoe", "moe_infinity"]


@pytest.fixture(autouse=True)
def silent():
    with quiet():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Four layers of eight experts for the compiled passes, the resident model's answers, and a trace to learn from."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("compiled")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=300, hidden_size=256, intermediate_size=64, moe_intermediate_size=128, num_hidden_layers=4, num_experts=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts_per_tok=2, initializer_range=0.1,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    model = load(folder).model
    ids = torch.randint(0, 300, (1, 17))
    with moesaic.trace(model, lookahead=3, logits=True) as recorder:
        tokens = answer(model, ids)
        answer(model, ids.flip(1)[:, :7], 6)
    history, _ = history_of(recorder.result, 1.0)
    with torch.no_grad():
        return SimpleNamespace(folder=folder, ids=ids, logits=model(ids).logits, tokens=tokens, history=history)


def answer(model, ids, tokens=12):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None
    )


@pytest.mark.parametrize("policy", [e.name for e in entries("policies") if e.name not in ONLY_REPLAYED])
def test_every_policy_that_can_run_gives_the_same_bits(checkpoint, policy):
    for share in (0.2, 0.6):
        with load_streamed(checkpoint.folder, resident=share, policy=policy, history=checkpoint.history) as streamed:
            for _ in range(2):
                assert torch.equal(answer(streamed.model, checkpoint.ids), checkpoint.tokens), share
                with torch.no_grad():
                    assert torch.equal(streamed.model(checkpoint.ids).logits, checkpoint.logits), share
            stats = streamed.stats
            assert stats.hits + stats.row()["loads"] + stats.row()["streamed"] + stats.row()["late"] == stats.accesses
            assert streamed.engine.held_bytes <= streamed.engine.plan.budget_bytes
            assert stats.prefetch_failed == 0


@pytest.mark.parametrize("policy", sorted(ONLY_REPLAYED))
def test_what_only_the_replay_brings_is_refused_with_the_reason(checkpoint, policy):
    with pytest.raises(BadInput, match=f"policy {policy} (needs|changes|runs)"):
        load_streamed(checkpoint.folder, resident=0.5, policy=policy, history=checkpoint.history)


def test_the_future_is_refused_in_words(checkpoint):
    with pytest.raises(MissingNeed, match="nobody knows it while a model runs"):
        load_streamed(checkpoint.folder, resident=0.5, policy="belady")
    with pytest.raises(BadInput, match="prefetch of -1 bytes"):
        load_streamed(checkpoint.folder, resident=0.5, policy="fate", prefetch_bytes=-1)


def at_once(streamed, one_by_one):
    """Every guess has arrived before anything else happens; of some policies, before the next guess."""
    ahead, policy = streamed.engine.prefetch, streamed.engine.policy
    ask, prefetch, one = ahead.ask, policy.prefetch, streamed.engine.layers[0].bytes_E[0]
    if one_by_one:
        policy.prefetch = lambda budget: prefetch(one)

    def waiting(layer, choice):
        before = -1
        while before < streamed.stats.prefetched_bytes:
            before = streamed.stats.prefetched_bytes
            ask(layer, choice)
            for fetch in ahead.flying.values():
                fetch.wait()
            ahead.land()
            if not one_by_one:
                break

    ahead.ask = waiting


@pytest.mark.parametrize("policy", GUESSING)
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_guesses_that_arrive_at_once_are_those_of_the_replay(checkpoint, tmp_path, policy, share):
    """A link of endless speed in the simulator; every guess waited for here."""
    machine = Hardware(link_bytes_per_second=1e18, link_latency_seconds=0.0, device_bytes_per_second=1e9)
    streamed = load_streamed(checkpoint.folder, resident=share, policy=policy, hardware=machine, prefetch_bytes=1 << 40)
    at_once(streamed, one_by_one=policy == "moe_infinity")
    live_trace = moesaic.trace(streamed.model, tmp_path / "live.moetrace", lookahead=3, logits=True)
    with streamed, live_trace as recorder:
        assert torch.equal(answer(streamed.model, checkpoint.ids), checkpoint.tokens)
        answer(streamed.model, checkpoint.ids.flip(1)[:, :5], 4)
    live = streamed.stats
    simulated = replay(recorder.result, build(policy), streamed.engine.plan.capacity_bytes, machine)
    for ours, theirs in ((C.ACCESSES, sim.ACCESSES), (C.HITS, sim.HITS), (C.LOADS, sim.LOADS), (C.STREAMS, sim.STREAMS),
                         (C.LATES, sim.LATES), (C.EVICTIONS, sim.EVICTIONS)):  # fmt: skip
        rows = live.count_CL[ours], simulated.count_CL[theirs]
        if ours == C.EVICTIONS and policy == "moe_infinity":  # one cache for all layers: of the leaver's, or of the comer's
            rows = rows[0].sum(), rows[1].sum()
        assert np.array_equal(*rows), (ours, theirs)
    assert live.prefetched_bytes == simulated.count[sim.FETCHED]
    assert live.prefetch_used_bytes == simulated.used_bytes
    assert live.read_bytes == simulated.moved_bytes
    if policy != "moe_infinity":  # two requests teach it little
        assert live.prefetch_used_bytes > 0


def guesses_fail(monkeypatch, fault):
    """A reader whose prefetches meet `fault()`; demanded reads do not."""
    begin, guessed = Reader.fetch, set()

    def fetch(self, pieces, prefetch=False):
        pieces = list(pieces)
        (guessed.update if prefetch else guessed.difference_update)({source.start for source, _ in pieces})
        return begin(self, pieces, prefetch)

    def read_at(fd, buffers, offset):
        if offset in guessed:
            fault()
        return os.preadv(fd, buffers, offset)

    monkeypatch.setattr(Reader, "fetch", fetch)
    return Reader("keep", threads=2, timeout=0.5, read_at=read_at)


@pytest.mark.parametrize("policy", ["fate:shallow=0", "mixtral_offloading", "hybrimoe"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_prefetch_that_fails_is_a_miss_later(checkpoint, monkeypatch, policy, share):
    def broken():
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    reader = guesses_fail(monkeypatch, broken)
    with load_streamed(checkpoint.folder, resident=share, policy=policy, reader=reader) as streamed:
        for _ in range(2):
            assert torch.equal(answer(streamed.model, checkpoint.ids), checkpoint.tokens)
        stats = streamed.stats
        assert stats.prefetch_failed > 0
        assert stats.prefetched_bytes > 0
        assert streamed.engine.held_bytes <= streamed.engine.plan.budget_bytes


def test_a_demand_that_fails_is_still_an_error(checkpoint, monkeypatch):
    def broken(fd, buffers, offset):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with load_streamed(checkpoint.folder, resident=0.3, policy="mixtral_offloading") as streamed:
        streamed.engine.reader._read_at = broken
        with pytest.raises(ReadFailed, match="Input/output error"):
            answer(streamed.model, checkpoint.ids)


def test_slow_guesses_are_late_or_dropped_and_harm_nobody(checkpoint, monkeypatch):
    reader = guesses_fail(monkeypatch, lambda: time.sleep(0.003))
    with load_streamed(checkpoint.folder, resident=0.4, policy="fate:shallow=0+extra=2", reader=reader) as streamed:
        assert torch.equal(answer(streamed.model, checkpoint.ids), checkpoint.tokens)
        row = streamed.stats.row()
        assert row["late"] > 0
        assert row["prefetch_used_bytes"] > 0
        assert row["prefetch_wasted_bytes"] > 0
        assert row["prefetch_used_bytes"] + row["prefetch_wasted_bytes"] <= row["prefetched_bytes"]


def test_the_budget_of_a_pass_holds(checkpoint):
    size = None
    for budget in (0, 1, 3):
        size = size or 3 * 256 * 128 * 2
        with (
            load_streamed(checkpoint.folder, resident=0.6, policy="fate:shallow=0", prefetch_bytes=budget * size) as streamed,
            torch.no_grad(),
        ):
            ids, cache = checkpoint.ids, None
            for _ in range(5):
                before = streamed.stats.prefetched_bytes
                output = streamed.model(ids, past_key_values=cache, use_cache=True)
                ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
                assert streamed.stats.prefetched_bytes - before <= budget * size
            assert (streamed.stats.prefetched_bytes > 0) == (budget > 0)


def test_a_bank_run_by_hand_and_steering_under_a_guessing_policy(checkpoint):
    resident = load(checkpoint.folder).model
    with load_streamed(checkpoint.folder, resident=0.4, policy="hybrimoe") as streamed, torch.no_grad():
        ours, theirs = moesaic.view(streamed.model), moesaic.view(resident)
        x, offsets = torch.randn(16, 256).bfloat16(), torch.arange(0, 17, 2)
        assert torch.equal(ours[2].bank(x, offsets), theirs[2].bank(x, offsets))
        with ours.policy(k=1, without=[3]), theirs.policy(k=1, without=[3]):
            assert torch.equal(streamed.model(checkpoint.ids).logits, resident(checkpoint.ids).logits)


def test_loads_are_asked_for_however_many_guesses_are_late():
    """Late guesses take none of the places of loads in flight: a load that nobody asked for would be computed unread."""
    asked = []
    engine = SimpleNamespace(_staging={0: []}, _into=lambda layer, e, slot: asked.append(e))
    layer = SimpleNamespace(kinds=[0], aside=False, held={2: 0, 5: 1})
    late = {e: object() for e in range(20, 40)}
    Wave(engine, layer, [2, 5], set(), late)
    assert asked == [2, 5]
