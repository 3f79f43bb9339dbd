"""Experts of one layer in different widths: each takes its own bytes of the budget, and everything else holds as before."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import moesaic
from moesaic.core.errors import BadInput
from moesaic.serving.streamed import load_streamed
from moesaic.serving.streamed import stats as C
from moesaic.serving.streamed.bits import Bits
from moesaic.serving.streamed.packing import pack
from moesaic.trace import simulate as sim
from moesaic.trace.policies import state as S
from moesaic.trace.policies.policy import Shape
from moesaic.trace.replay import replay
from moesaic.trace.sweep import build
from moesaic.view import load, quiet

FIRST, SECOND = ([8, 4, 4, 2, 4, 8, 2, 4], [2, 2, 8, 4, 4, 4, 8, 4])
"""Bits of the experts of both layers."""


@pytest.fixture(autouse=True)
def silent():
    with quiet():
        yield


def checkpoint(folder):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=300, hidden_size=128, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=2,
        num_experts=8, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts_per_tok=2, initializer_range=0.1,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def widths(*layers):
    return Bits({f"model.layers.{i}.mlp.experts.{e}": bits for i, row in enumerate(layers) for e, bits in enumerate(row)})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A packed folder with three widths in each layer, and what the resident model says."""
    folder = tmp_path_factory.mktemp("mixed")
    with quiet():
        plan = pack(checkpoint(folder / "model"), folder / "out", bits=widths(FIRST, SECOND), group_size=32)
        model = load(folder / "out").model
    ids = torch.randint(0, 300, (1, 33))
    with torch.no_grad():
        logits = model(ids).logits
    sizes = {bits: sum(pair) for bits, pair in plan.contents.blocks[0].sizes.items()}
    return SimpleNamespace(folder=folder / "out", ids=ids, logits=logits, tokens=answer(model, ids), sizes=sizes)


def answer(model, ids, tokens=12):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None
    )


@pytest.mark.parametrize("share", [0.35, 0.7, 1.0])
@pytest.mark.parametrize("policy", ["lru", "lfu", "slru", "lru:scope=global", "static:mask=uniform", "none"])
def test_streamed_is_resident_and_counts_are_those_of_the_replay(mixed, tmp_path, policy, share):
    streamed = load_streamed(mixed.folder, resident=share, policy=policy)
    engine = streamed.engine
    with streamed, moesaic.trace(streamed.model, tmp_path / "live.moetrace") as recorder:
        assert torch.equal(answer(streamed.model, mixed.ids), mixed.tokens)
        with torch.no_grad():
            assert torch.equal(streamed.model(mixed.ids).logits, mixed.logits)
    assert engine.shape.sizes_LE.tolist() == [[mixed.sizes[bits] for bits in row] for row in (FIRST, SECOND)]
    assert sorted(sum(kind[0] + kind[1]) for kind in engine._slots) == sorted(mixed.sizes[bits] for bits in (2, 4, 8))
    assert engine.held_bytes <= engine.plan.budget_bytes + sum(slots.count * 256 for slots in engine._slots.values())
    assert engine.policy.used_bytes() <= engine.plan.capacity_bytes
    live = engine.stats
    simulated = replay(recorder.result, build(policy), engine.plan.capacity_bytes, shape=engine.shape)
    for ours, theirs in ((C.ACCESSES, sim.ACCESSES), (C.HITS, sim.HITS), (C.LOADS, sim.LOADS), (C.STREAMS, sim.STREAMS),
                         (C.EVICTIONS, sim.EVICTIONS)):  # fmt: skip
        assert np.array_equal(live.count_CL[ours], simulated.count_CL[theirs]), (ours, theirs)
    assert live.read_bytes == simulated.moved_bytes
    assert live.preloaded_bytes == simulated.preloaded_bytes
    if share == 1 and policy != "none":
        assert live.read_bytes + live.preloaded_bytes <= engine.shape.total_bytes  # everything fits, nothing is read twice


def test_narrow_experts_leave_room_for_more(mixed):
    """Half of the bytes hold more than half of the experts, where those that are used are narrow."""
    with load_streamed(mixed.folder, resident=0.6, policy="lru:scope=global") as streamed:
        block, engine = streamed.engine.layers[0].block, streamed.engine
        narrow = [e for e, bits in enumerate(FIRST) if bits == 2] + [e for e, bits in enumerate(FIRST) if bits == 4]
        with torch.no_grad():
            for e in narrow * 2:
                block.experts(torch.ones(1, 128, dtype=torch.bfloat16), torch.tensor([[e, e]]), torch.ones(1, 2))
        assert engine.stats.hits == len(narrow)
        held = sum(engine.layers[0].bytes_E[e] for e in narrow)
        assert held == sum(engine.layers[0].bytes_E[e] for e in engine.layers[0].held)


@pytest.mark.parametrize("first", [16, 8])
def test_a_layer_that_keeps_some_experts_whole_is_widened(tmp_path, first):
    """Whichever comes first: what lies in a slot is decided expert by expert."""
    bits = [first, 8, 16, 4, 8, 16, 8, 8]
    pack(checkpoint(tmp_path / "model"), tmp_path / "out", bits=widths(bits, [8] * 8), group_size=32)
    ids = torch.randint(0, 300, (1, 17))
    with torch.no_grad(), load_streamed(tmp_path / "out", resident=0.5) as streamed:
        expected = load(tmp_path / "out").model(ids).logits
        assert torch.equal(streamed.model(ids).logits, expected)
        wide, records = streamed.engine.layers
        assert wide.kinds[0][2] == torch.bfloat16 and wide.bytes_E == [wide.block.expert_bytes] * 8
        assert records.kinds[0][2] == torch.uint8 and records.bytes_E[0] < wide.bytes_E[0]


def test_a_budget_must_hold_one_expert_of_each_width(mixed):
    least = sum(mixed.sizes[bits] for bits in (2, 4, 8))
    with pytest.raises(BadInput, match=rf"one expert to stream through takes .* \({least} bytes\)"):
        load_streamed(mixed.folder, memory=least - 1)
    with load_streamed(mixed.folder, memory=least) as streamed, torch.no_grad():
        assert torch.equal(streamed.model(mixed.ids).logits, mixed.logits)


@pytest.mark.parametrize("name", ["lru", "lfu", "slru", "fate", "mixtral_offloading", "static:mask=random"])
def test_no_policy_takes_more_than_its_capacity(name):
    """Random events on experts of very different sizes: what the policy says it holds are the bytes of what it holds."""
    rng = np.random.default_rng(0)
    shape = Shape.of_experts(rng.integers(1, 100, (4, 16)).tolist(), 2)
    for share in (0.05, 0.3, 0.7, 1.0):
        policy = build(name)
        policy.start(shape, int(share * shape.total_bytes))
        for step in range(40):
            policy.begin_step(prefill=step % 5 == 0)
            for layer in range(4):
                experts = rng.choice(16, 8 if step % 5 == 0 else 2, replace=False)
                policy.event(layer, experts, ahead_AM=rng.choice(16, (1, 4), replace=False))
                for l, e in policy.prefetch(200).fetch_N2.tolist():
                    policy.arrived(l, e)
                held = policy.state.cell[S.RESIDENT] != S.ABSENT
                assert policy.used_bytes() == shape.sizes_LE[held].sum() <= policy.capacity_bytes
        if share == 1:
            assert policy.capacity_bytes == shape.total_bytes
