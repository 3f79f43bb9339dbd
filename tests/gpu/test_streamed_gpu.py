"""Streamed experts with a real GPU as the upper tier: the resident CUDA model's answers, budgets, and no needless waiting."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moesaic.serving.streamed import load_streamed
from moesaic.serving.streamed.cuda_device import CudaDevice
from moesaic.serving.streamed.device_load import over_memory
from moesaic.trace.hardware import KNOWN
from moesaic.view import View, load, quiet

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of the largest logit. Products on the host round otherwise than those on the device."""
HOSTING = ["hybrimoe:ahead=0", "llama_cpp:copy_tokens=5"]


@pytest.fixture(autouse=True)
def silent():
    with quiet():
        yield


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def checkpoint(request, tmp_path_factory):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=300, hidden_size=256, intermediate_size=64, moe_intermediate_size=512, num_hidden_layers=3, num_experts=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts_per_tok=2, initializer_range=0.1,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(getattr(torch, request.param)).save_pretrained(folder)
    ids = torch.randint(0, 300, (1, 19), device="cuda")
    resident = load(folder, device="cuda").model
    return SimpleNamespace(
        folder=folder, ids=ids, logits=logits_of(resident, ids), size=View(resident)[0].expert_bytes, layers=3, experts=24
    )


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


def close_to(got, want):
    most = want.float().abs().max()
    return (got.float() - want.float()).abs().max() <= TOLERANCE[want.dtype] * most


@pytest.mark.parametrize("experts", [1, 5, 24])
@pytest.mark.parametrize("buffered", [False, True])
def test_moved_experts_give_the_resident_models_answer(checkpoint, experts, buffered):
    model = load(checkpoint.folder).model
    tier = over_memory(model, CudaDevice(buffered=buffered), experts * checkpoint.size)
    for _ in range(3):
        assert close_to(logits_of(model, checkpoint.ids), checkpoint.logits)
        for at in range(3):
            assert close_to(logits_of(model, checkpoint.ids[:, : at + 1]), checkpoint.logits[:, : at + 1])
    row = tier.stats.row()
    assert row["device_host_runs"] == 0
    assert row["device_moved_bytes"] == checkpoint.size * (row["device_loads"] + row["device_streamed"])
    tier.close()


def test_moved_experts_give_the_same_bits_at_every_budget(checkpoint):
    found = []
    for experts in (2, 9, 24):
        model = load(checkpoint.folder).model
        tier = over_memory(model, "cuda", experts * checkpoint.size)
        found.append([logits_of(model, checkpoint.ids) for _ in range(2)][-1])
        tier.close()
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


@pytest.mark.parametrize("policy", HOSTING)
def test_hybrid_is_equal_to_rounding(checkpoint, policy):
    model = load(checkpoint.folder).model
    tier = over_memory(model, "cuda", 5 * checkpoint.size, policy=policy, hardware=KNOWN["pcie4"])
    for at in (1, 2, 4, 19):
        assert close_to(logits_of(model, checkpoint.ids[:, :at]), checkpoint.logits[:, :at])
    assert tier.stats.row()["device_host_runs"] > 0
    tier.close()


def test_three_tiers(checkpoint):
    with load_streamed(
        checkpoint.folder, resident=0.3, page_cache="keep", device="cuda", device_memory=4 * checkpoint.size
    ) as streamed:
        for _ in range(2):
            assert close_to(logits_of(streamed.model, checkpoint.ids), checkpoint.logits)
        assert streamed.engine.held_bytes <= streamed.engine.plan.budget_bytes + 24 * 2 * 128


def test_the_budget_holds_on_the_device(checkpoint):
    model = load(checkpoint.folder).model
    other = sum(p.nbytes for p in model.parameters()) - checkpoint.experts * checkpoint.size
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    budget = 6 * checkpoint.size
    tier = over_memory(model, "cuda", budget)
    logits_of(model, checkpoint.ids)
    activations = 8 << 20  # rows of 19 tokens, workspaces of cuBLAS aside
    assert torch.cuda.max_memory_allocated() - before <= other + budget + activations + (64 << 20)
    assert tier.held_bytes <= budget
    tier.close()


def test_costs_are_measured(checkpoint):
    model = load(checkpoint.folder).model
    tier = over_memory(model, "cuda", 5 * checkpoint.size, policy="hybrimoe:ahead=0")
    assert tier.hardware.link_bytes_per_second > 0
    assert tier.hardware.host_flops > 0
    assert close_to(logits_of(model, checkpoint.ids), checkpoint.logits)
    tier.close()


def test_one_wait_per_layer_and_none_per_expert(checkpoint, monkeypatch):
    """Every way to wait for the device is counted, and PyTorch itself is told to refuse hidden ones."""
    model = load(checkpoint.folder).model
    tier = over_memory(model, "cuda", 24 * checkpoint.size)
    x = torch.randn(7, 256, device="cuda").to(checkpoint.logits.dtype)
    weights_TK, ids_TK = torch.rand(7, 8, device="cuda").topk(2)
    layer, backs = tier.layers[1], []
    with torch.inference_mode():
        tier.routed(layer, x, ids_TK, weights_TK)
    read_back = tier.device.read_back

    def counted(tensors):
        backs.append(len(tensors))
        torch.cuda.set_sync_debug_mode("default")
        try:
            return read_back(tensors)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(tier.device, "read_back", counted)
    try:
        torch.cuda.set_sync_debug_mode("error")
        with torch.inference_mode():
            tier.routed(layer, x, ids_TK, weights_TK)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert backs == [2]
    tier.close()
