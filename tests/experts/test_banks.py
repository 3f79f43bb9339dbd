"""Cards' claims about banks: DeepSeekMoE's slicing, HMoE's widths, SMoRA's ranks, and reading and replacing experts."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from moesaic.core.errors import BadInput
from moesaic.core.routing import Dispatch, Routing
from moesaic.experts.gated_mlp import GatedMLP
from moesaic.experts.lora_ranks import LoraRanks
from moesaic.experts.shared import SharedExperts
from moesaic.experts.unequal import Unequal, arithmetic_widths
from moesaic.layers.moe import MoE


def test_a_sliced_dense_ffn_with_unit_weights_is_the_dense_ffn():
    dense, sliced = GatedMLP(16, 1, 24), GatedMLP(16, 3, 8)
    gate, up = dense.gate_up_EHD.data[0].chunk(2)
    for e in range(3):
        rows = slice(8 * e, 8 * e + 8)
        sliced[e] = {"gate_up_EHD": torch.cat([gate[rows], up[rows]]), "down_EDI": dense.down_EDI.data[0][:, rows]}
    x = torch.randn(11, 16)
    every = Dispatch.of(Routing(torch.zeros(11, 3), experts_TK=torch.arange(3).repeat(11, 1), weights_TK=torch.ones(11, 3)))
    torch.testing.assert_close(sliced.run(x, every), dense(x, torch.tensor([0, 11])), rtol=1e-4, atol=1e-5)


def test_fused_shared_experts_are_the_sum_of_separate_ones():
    fused = SharedExperts(16, 8, count=3)
    gate, up = fused.gate_up_HD.data.chunk(2)
    x, total = torch.randn(11, 16), 0
    for s in range(3):
        rows = slice(8 * s, 8 * s + 8)
        one = SharedExperts(16, 8)
        one.gate_up_HD.data = torch.cat([gate[rows], up[rows]])
        one.down_DI.data = fused.down_DI.data[:, rows]
        total = total + one(x)
    torch.testing.assert_close(fused(x), total, rtol=1e-4, atol=1e-5)


def test_deepseek_layer_without_renormalisation():
    moe = MoE(16, 8, shared=SharedExperts(16, 8, count=2), router_options={"k": 3, "convention": "softmax"})
    x = torch.randn(11, 16)
    y, routing = moe(x)
    assert (routing.weights_TK.sum(1) < 1).all()
    routed = moe.bank.run(x, Dispatch.of(routing))
    torch.testing.assert_close(y, routed + moe.shared(x))


def test_reading_and_replacing_one_expert():
    bank = GatedMLP(16, 4, 8)
    x, offsets = torch.randn(6, 16), torch.tensor([0, 0, 6, 6, 6])
    before, kept = bank(x, offsets), {k: v.clone() for k, v in bank[1].items()}
    bank[1] = {k: torch.randn_like(v) for k, v in kept.items()}
    assert not torch.equal(bank(x, offsets), before)
    bank[1] = kept
    assert torch.equal(bank(x, offsets), before)
    with pytest.raises(BadInput, match=r"expert 1, down_EDI: expected shape \(16, 8\), got \(8, 16\)"):
        bank[1] = {**kept, "down_EDI": torch.zeros(8, 16)}
    assert torch.equal(bank(x, offsets), before)
    with pytest.raises(BadInput, match="has tensors"):
        bank[1] = {"w": torch.zeros(1)}
    with pytest.raises(IndexError, match="expert 4"):
        bank[4]


def test_two_experts_swap():
    bank = GatedMLP(16, 4, 8)
    first, second = bank[0], bank[1]
    bank[0], bank[1] = bank[1], bank[0]
    assert torch.equal(bank[0]["down_EDI"], second["down_EDI"])
    assert torch.equal(bank[1]["down_EDI"], first["down_EDI"])


def test_rows_may_share_a_stored_expert():
    moe = MoE(16, 4, bank=GatedMLP(16, 4, 8))
    x = torch.randn(9, 16)
    for e in (2, 3):
        moe.bank[e] = moe.bank[e - 2]
    want = moe(x)[0]
    small = GatedMLP(16, 2, 8)
    for e in range(2):
        small[e] = moe.bank[e]
    small.row_to_expert = torch.tensor([0, 1, 0, 1])
    shared = MoE(16, 4, router=moe.router, bank=small)
    torch.testing.assert_close(shared(x)[0], want, rtol=1e-4, atol=1e-5)


def test_arithmetic_widths_and_cost():
    assert arithmetic_widths(8, 4096) == [2304, 2816, 3328, 3840, 4352, 4864, 5376, 5888]
    bank = Unequal(16, 4, width=10)
    assert sum(bank.widths) == 40
    torch.testing.assert_close(bank.cost_E, torch.tensor([6.0 * 16 * w for w in bank.widths]))
    assert GatedMLP(16, 4, 10).cost_E.tolist() == [6.0 * 16 * 10] * 4


def test_equal_widths_are_the_gated_mlp():
    unequal, equal = Unequal(16, 3, widths=[8, 8, 8]), GatedMLP(16, 3, 8)
    for e in range(3):
        equal[e] = {"gate_up_EHD": unequal[e]["gate_up_HD"].data, "down_EDI": unequal[e]["down_DI"].data}
    x, offsets = torch.randn(10, 16), torch.tensor([0, 4, 4, 10])
    torch.testing.assert_close(unequal(x, offsets), equal(x, offsets), rtol=1e-4, atol=1e-5)


def test_all_ranks_with_gate_one_are_a_plain_lora():
    bank = LoraRanks(16, 8, alpha=16, k=8)
    bank.b_ED.data.normal_()
    x = torch.randn(12, 16)
    every = Dispatch.of(Routing(torch.zeros(12, 8), experts_TK=torch.arange(8).repeat(12, 1), weights_TK=torch.ones(12, 8)))
    want = 16 / 8 * (x @ bank.a_ED.T) @ bank.b_ED
    torch.testing.assert_close(bank.run(x, every), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(every.combine(bank(x[every.token_S], every.offsets_E1)), want, rtol=1e-4, atol=1e-5)


def test_lora_ranks_adapt_a_frozen_mlp():
    frozen = LoraRanks.frozen(SharedExperts(16, 8))
    moe = MoE(16, 8, bank="lora_ranks", shared=frozen, router_options={"k": 4, "convention": "sigmoid", "scale": 4.0})
    x = torch.randn(20, 16)
    y, routing = moe(x)
    assert torch.equal(y, frozen(x))  # B starts at 0: a no-op
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.full((20,), 4.0))
    optimizer = torch.optim.AdamW([p for p in moe.parameters() if p.requires_grad], lr=1e-2)
    target, kept = torch.randn(20, 16), frozen.down_DI.clone()
    losses = []
    for _ in range(60):
        loss = (moe(x)[0] - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(frozen.down_DI, kept) and frozen.down_DI.grad is None


def test_bad_banks():
    with pytest.raises(BadInput, match="positive widths"):
        Unequal(16, 3, widths=[8, 8])
    with pytest.raises(BadInput, match="leaves no FFN"):
        MoE(16, 3, "moepp", host={"previous"}, router_options={"k": 1})
    with pytest.raises(BadInput, match="keeps its experts apart"):
        Unequal(16, 3).merge(torch.ones(1, 3))
    with pytest.raises(BadInput, match="routes over 4 experts, the bank serves 3"):
        MoE(16, 4, bank=GatedMLP(16, 3))


PEAK = """
import resource
import torch
from moesaic.core.context import RoutingContext
from moesaic.layers.moe import MoE
moe = MoE(64, 1000, "topk", router_options={"k": 8}, bank_options={"width": 64}).train()
x = torch.randn(1024, 64, requires_grad=True)
weights = sum(p.numel() * 4 for p in moe.parameters()) / 2**20
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
y, routing = moe(x, RoutingContext(mode="train"))
y.square().mean().backward()
print(peak() - before - weights)
"""


def test_1000_experts_run_in_bounded_memory():
    """Beside a gradient for every weight, a step holds its 8,192 pairs (30 MB); all experts on all tokens would be 500 MB."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200


@pytest.mark.parametrize("tokens", [1, 63, 200])
def test_1000_experts_equal_the_twin(tokens):
    """Most experts are empty; forward and every gradient of the chosen kernel against the naive loop."""
    torch.manual_seed(0)
    bank = GatedMLP(16, 1000, 8)
    experts_TK = torch.rand(tokens, 1000).topk(8, 1).indices
    weights_TK, x_TD = torch.rand(tokens, 8, requires_grad=True), torch.randn(tokens, 16, requires_grad=True)
    found = []
    for kernel in ("auto", "reference"):
        bank.kernel = kernel
        y_TD = bank.run(x_TD, Dispatch.of_slots(experts_TK, weights_TK, 1000))
        wanted = (x_TD, weights_TK, bank.gate_up_EHD, bank.down_EDI)
        found.append((y_TD, *torch.autograd.grad(y_TD.square().sum(), wanted)))
    for ours, twin in zip(*found, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-4)
