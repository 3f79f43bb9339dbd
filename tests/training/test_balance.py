"""Balance through the view: the losses of the formula, with gradient, whatever the run's precision."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic.core.errors import BadInput
from moesaic.training.balance import Balance, load_facts, max_violation


@pytest.fixture
def model(tiny_moe):
    return AutoModelForCausalLM.from_pretrained(tiny_moe)


def test_switch_and_z_by_their_formulas(model):
    balance = Balance(model, {"switch": 0.5, "z": {"coefficient": 0.25}})
    assert balance.coefficients == {"switch": 0.5, "z": 0.25}
    ids = torch.randint(100, (2, 9))
    logits = model(input_ids=ids, output_router_logits=True).router_logits
    found, load = balance.losses(2, training=True), balance.load()
    switch, z = [], []
    for layer, logits_TE in enumerate(logits):
        probs = logits_TE.softmax(-1)
        share = torch.bincount(probs.topk(2).indices.flatten(), minlength=4) / 36
        torch.testing.assert_close(load[layer], share)
        switch.append(4 * (share * probs.mean(0)).sum())
        z.append(logits_TE.logsumexp(-1).square().mean())
    torch.testing.assert_close(found["switch"], torch.stack(switch).mean())
    torch.testing.assert_close(found["z"], torch.stack(z).mean())
    sum(found.values()).backward()
    gates = [p for name, p in model.named_parameters() if "mlp.gate." in name]
    assert len(gates) == 2
    assert all(gate.grad is not None and gate.grad.abs().sum() > 0 for gate in gates)


def test_hooks_leave_with_close(model):
    balance = Balance(model, {})
    model(input_ids=torch.tensor([[1, 2]]))
    assert len(balance.load()) == 2
    balance.clear()
    balance.close()
    model(input_ids=torch.tensor([[1, 2]]))
    assert balance.load() == []


def test_a_controller_that_the_model_cannot_take(model):
    with pytest.raises(BadInput, match=r"balance\.bias: .*bias_E"):
        Balance(model, {"bias": 0.001})


def test_max_violation():
    assert max_violation(torch.tensor([0.25, 0.25, 0.5, 0.0])) == pytest.approx(1.0)
    assert max_violation(torch.full((8,), 1 / 8)) == pytest.approx(0.0)


def test_facts_of_a_load():
    even, skew = torch.full((4,), 0.25), torch.tensor([0.5, 0.5, 0.0, 0.0])
    facts = load_facts([even, skew])
    assert facts == {
        "max_vio": [0.0, 1.0], "load_cv": [0.0, 1.0], "load_entropy": [1.0, 0.5], "dead_experts": [0, 2]
    }  # fmt: skip


def test_a_global_scope_counts_over_micro_steps(model):
    balance = Balance(model, {"switch": 1.0}, "global")
    counts = []
    for seed in (0, 1):
        ids = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(seed))
        logits = model(input_ids=ids, output_router_logits=True).router_logits
        counts.append(torch.stack([torch.bincount(one.topk(2).indices.flatten(), minlength=4) for one in logits]))
        found = balance.losses(2, training=True)["switch"]
        share_LE = sum(counts) / sum(counts).sum(1, keepdim=True)
        want = [4 * (f * one.softmax(-1).mean(0)).sum() for f, one in zip(share_LE, logits, strict=True)]
        torch.testing.assert_close(found, torch.stack(want).mean())
    balance.after_step()
    balance.losses(2, training=True)
