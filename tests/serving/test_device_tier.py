"""A device over RAM over disk, with plain memory in the device's place: bits, counts, budgets and failures."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import moesaic
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.serving.streamed import load_streamed
from moesaic.serving.streamed import stats as C
from moesaic.serving.streamed.device_load import over_disk, over_memory
from moesaic.serving.streamed.device_stats import HOSTS
from moesaic.serving.streamed.devices import CopyFailed, HostDevice, device_of
from moesaic.trace import simulate as sim
from moesaic.trace.hardware import KNOWN
from moesaic.trace.replay import history_of, replay
from moesaic.trace.sweep import build
from moesaic.view import View, load, quiet, tiny
from moesaic.view.coverage import first_floats

MACHINE = KNOWN["pcie4"]
HOSTING = ["hybrimoe:ahead=0", "fiddler", "llama_cpp:copy_tokens=5"]
POLICIES = ["lru", "slru:protected=0.5", "none", "static:mask=uniform", *HOSTING]
COUNTS = [(C.ACCESSES, sim.ACCESSES), (C.HITS, sim.HITS), (C.LOADS, sim.LOADS), (C.STREAMS, sim.STREAMS), (HOSTS, sim.HOSTS)]


@pytest.fixture(autouse=True)
def silent():
    with quiet():
        yield


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def checkpoint(request, tmp_path_factory):
    """Three layers of eight experts: in bf16 for the compiled passes, in fp32 for the products of the libraries."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=300, hidden_size=256, intermediate_size=64, moe_intermediate_size=512, num_hidden_layers=3, num_experts=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts_per_tok=2, initializer_range=0.1,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(getattr(torch, request.param)).save_pretrained(folder)
    model = load(folder).model
    ids = torch.randint(0, 300, (1, 19))
    with moesaic.trace(model, logits=True) as recorder:
        tokens = answer(model, ids)
    with torch.no_grad():
        logits = model(ids).logits
    history, _ = history_of(recorder.result, 1.0)
    size = View(model)[0].expert_bytes
    return SimpleNamespace(folder=folder, ids=ids, logits=logits, tokens=tokens, history=history, size=size)


def answer(model, ids, tokens=6):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None
    )


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


def learnt(checkpoint, policy):
    return {"policy": policy, "history": checkpoint.history, "hardware": MACHINE}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("experts", [1, 5, 24])
def test_every_policy_and_budget_gives_the_same_bits(checkpoint, policy, experts):
    """Over all experts in memory: what is moved, what streams through and what the host computes are one sum."""
    model = load(checkpoint.folder).model
    tier = over_memory(model, HostDevice(), experts * checkpoint.size, **learnt(checkpoint, policy))
    for _ in range(2):
        assert torch.equal(answer(model, checkpoint.ids), checkpoint.tokens)
    assert torch.equal(logits_of(model, checkpoint.ids), checkpoint.logits)
    row = tier.stats.row()
    parts = [row[f"device_{name}"] for name in ("hits", "loads", "streamed", "host_runs")]
    assert sum(parts) == row["device_accesses"] > 0
    assert row["device_moved_bytes"] == checkpoint.size * (row["device_loads"] + row["device_streamed"])
    assert tier.held_bytes <= tier.plan.budget_bytes + tier._slots[tier.layers[0].kind].count * 2 * 128
    keeps_all = experts == 24 and policy != HOSTING[0]  # HybriMoE begins empty, and a quick host leaves it so
    assert (row["device_host_runs"] > 0) == (policy in HOSTING and not keeps_all)
    tier.close()


@pytest.mark.parametrize(("host", "experts", "policy"), [(0.1, 3, "lru"), (0.4, 6, "hybrimoe:ahead=0"), (0.2, 1, "fiddler")])
def test_three_tiers_together(checkpoint, host, experts, policy):
    with load_streamed(
        checkpoint.folder, resident=host, page_cache="keep", device=HostDevice(), device_memory=experts * checkpoint.size,
        device_policy=policy, history=checkpoint.history, hardware=MACHINE,
    ) as streamed:  # fmt: skip
        assert torch.equal(answer(streamed.model, checkpoint.ids), checkpoint.tokens)
        assert torch.equal(logits_of(streamed.model, checkpoint.ids), checkpoint.logits)
        tier, engine = streamed.tier, streamed.engine
        assert engine.held_bytes <= engine.plan.budget_bytes + 24 * 2 * 128
        assert tier.held_bytes <= tier.plan.budget_bytes + 24 * 2 * 128
        row = tier.stats.row()
        assert streamed.stats.accesses == row["device_accesses"] - row["device_hits"]  # the host sees what the device misses


def test_hits_are_those_of_the_replay(checkpoint, tmp_path):
    for policy in ("lru", "lru:scope=global", "hybrimoe:ahead=0", "fiddler", "llama_cpp:copy_tokens=5"):
        model = load(checkpoint.folder).model
        tier = over_memory(model, HostDevice(), 9 * checkpoint.size, **learnt(checkpoint, policy))
        with moesaic.trace(model, logits=True) as recorder:
            answer(model, checkpoint.ids, 8)
            answer(model, checkpoint.ids.flip(1)[:, :5], 3)
        simulated = replay(recorder.result, build(policy), tier.plan.capacity_bytes, MACHINE, history=checkpoint.history)
        for ours, theirs in [*COUNTS, (C.EVICTIONS, sim.EVICTIONS)]:
            assert np.array_equal(tier.stats.count_CL[ours], simulated.count_CL[theirs]), (policy, ours)
        assert tier.stats.moved_bytes == simulated.moved_bytes
        assert tier.stats.preloaded_bytes == simulated.preloaded_bytes
        tier.close()


@pytest.mark.parametrize("policy", ["lru", "hybrimoe:ahead=0", "llama_cpp:copy_tokens=5"])
def test_gathered_as_a_gpu_does_it_is_equal_to_rounding(checkpoint, policy):
    model = load(checkpoint.folder).model
    tier = over_memory(model, HostDevice(gathered=True), 5 * checkpoint.size, **learnt(checkpoint, policy))
    got = logits_of(model, checkpoint.ids).float()
    most = checkpoint.logits.float().abs().max()
    assert (got - checkpoint.logits.float()).abs().max() <= (1e-5 if checkpoint.logits.dtype == torch.float32 else 2e-2) * most
    answer(model, checkpoint.ids)
    assert (tier.stats.row()["device_host_runs"] > 0) == (policy != "lru")
    tier.close()


def test_what_is_moved_does_not_change_what_is_gathered(checkpoint):
    """Where nothing is computed on the host, rows and their sum are the same at every budget, bit for bit."""
    found = []
    for experts in (1, 4, 24):
        model = load(checkpoint.folder).model
        tier = over_memory(model, HostDevice(gathered=True), experts * checkpoint.size)
        found.append(logits_of(model, checkpoint.ids))
        tier.close()
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


@pytest.mark.parametrize("name", ["gpt_oss", "ernie4_5_vl_moe", "phimoe"])
@pytest.mark.parametrize("gathered", [False, True])
def test_other_forms_of_experts(name, gathered, tmp_path):
    """Biased, transposed and interleaved; two banks; a gate of its own."""
    architecture = next(a for a in tiny.architectures() if a.name == name)
    model = tiny.build(tiny.model_classes(architecture)[0])
    model.save_pretrained(tmp_path)
    inputs = tiny.inputs(model)
    with torch.no_grad():
        want = first_floats(load(tmp_path).model(**inputs))
        moved = load(tmp_path).model
        size = max(block.expert_bytes for block in View(moved))
        tier = over_memory(moved, HostDevice(gathered), 5 * size, policy="hybrimoe:ahead=0", hardware=MACHINE)
        got = first_floats(moved(**inputs))
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5) if gathered else torch.equal(got, want)
    assert tier.stats.count_CL[C.ACCESSES].sum() > 0
    tier.close()


def test_a_copy_that_fails_is_an_error_and_the_next_answer_is_right(checkpoint):
    faults = [0]

    def copy(target, source):
        faults[0] -= 1
        if faults[0] == 0:
            raise OSError("the link is down")
        target.copy_(source)

    with load_streamed(
        checkpoint.folder, resident=0.4, page_cache="keep", device=HostDevice(copy=copy), device_memory=4 * checkpoint.size
    ) as streamed:
        for at in (1, 8, 23):
            faults[0] = at
            with pytest.raises(CopyFailed, match="the link is down"):
                answer(streamed.model, checkpoint.ids)
            assert torch.equal(answer(streamed.model, checkpoint.ids), checkpoint.tokens)


def test_a_bank_run_by_hand_and_steered_routing(checkpoint):
    resident, model = load(checkpoint.folder).model, load(checkpoint.folder).model
    tier = over_memory(model, HostDevice(), 4 * checkpoint.size)
    with torch.no_grad():
        ours, theirs = moesaic.view(model), moesaic.view(resident)
        x, offsets = torch.randn(16, 256).to(checkpoint.logits.dtype), torch.arange(0, 17, 2)
        assert torch.equal(ours[2].bank(x, offsets), theirs[2].bank(x, offsets))
        with ours.policy(k=1, without=[3]), theirs.policy(k=1, without=[3]):
            assert torch.equal(model(checkpoint.ids).logits, resident(checkpoint.ids).logits)
    tier.close()


def test_costs_are_measured_where_the_policy_asks_for_them(checkpoint):
    model = load(checkpoint.folder).model
    tier = over_memory(model, HostDevice(), 4 * checkpoint.size, policy="hybrimoe:ahead=0")
    assert tier.hardware.name == "measured with stand-in"
    assert tier.hardware.host_flops > 0
    assert torch.equal(answer(model, checkpoint.ids), checkpoint.tokens)
    tier.close()


def test_refused_in_words(checkpoint):
    def over(policy="lru", memory=4 * checkpoint.size, **how):
        return over_memory(load(checkpoint.folder).model, HostDevice(), memory, policy=policy, **how)

    with pytest.raises(MissingNeed, match="policy hybrimoe needs ahead"):
        over("hybrimoe")
    with pytest.raises(BadInput, match="reads ahead"):
        over("moe_infinity", history=checkpoint.history)
    with pytest.raises(MissingNeed, match="needs future"):
        over("belady")
    with pytest.raises(BadInput, match="too small"):
        over(memory=checkpoint.size - 1)
    with pytest.raises(BadInput, match="cuda:NUMBER"):
        device_of("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="finds no CUDA device"):
            device_of("cuda")
    with pytest.raises(BadInput, match="give --device"):
        load_streamed(checkpoint.folder, resident=0.5, device_memory="1GiB")
    with pytest.raises(BadInput, match="device_memory"):
        load_streamed(checkpoint.folder, resident=0.5, device="stand-in")
    with pytest.raises(BadInput, match="lossy modes stream to the CPU only"):
        load_streamed(checkpoint.folder, resident=0.5, lossy="skip", device="stand-in", device_memory=4 * checkpoint.size)
    with (
        load_streamed(checkpoint.folder, resident=0.5, policy="mixtral_offloading") as streamed,
        pytest.raises(BadInput, match="under a device give lru"),
    ):
        over_disk(View(streamed.model), streamed.engine, HostDevice(), 4 * checkpoint.size)
