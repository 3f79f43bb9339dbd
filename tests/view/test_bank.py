"""`block.bank`: the same canonical expert from every storage, replaced in place, with errors that name what is wrong."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

import moesaic
from moesaic.core.errors import BadInput


def by_hand(block, expert, x):
    """One expert from its canonical tensors, with the architecture's own gate fed as the architecture stores it."""
    up = linear(x, expert["up"], expert.get("up_bias"))
    if "gate" not in expert:
        hidden = block.experts.act_fn(up)
    else:
        gate = linear(x, expert["gate"], expert.get("gate_bias"))
        both = torch.stack([gate, up], -1).flatten(-2) if block.kind.interleaved else torch.cat([gate, up], -1)
        hidden = block.experts._apply_gate(both)
    return linear(hidden, expert["down"], expert.get("down_bias"))


def test_every_expert_is_read_in_one_orientation(model):
    """Expert e by hand from its canonical tensors equals what the stored module computes for expert e."""
    for block in moesaic.view(model):
        x = torch.randn(3, block.bank.width)
        for e, expert in enumerate(block.bank):
            assert expert.up.shape[1] == expert.down.shape[0] == block.bank.width
            with torch.no_grad():
                stored = block.experts(x, torch.full((3, 1), e), torch.ones(3, 1))
                torch.testing.assert_close(by_hand(block, expert, x), stored, rtol=1e-5, atol=1e-6)


def test_replace_writes_into_the_stored_layout(model, ids, logits):
    """Expert a over expert b: the module computes a for b, nothing else moved, and putting b back is bitwise."""
    view = moesaic.view(model)
    before = logits(model, ids)
    bank = view[0].bank
    others = {e: bank[e] for e in range(2, len(bank))}
    bank[0], bank[1] = bank[1], bank[0]
    assert not torch.equal(logits(model, ids), before)
    for e, expert in others.items():
        assert all(torch.equal(expert[name], bank[e][name]) for name in expert)
    x = torch.randn(3, bank.width)
    with torch.no_grad():
        swapped = view[0].experts(x, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
        torch.testing.assert_close(swapped, by_hand(view[0], bank[0], x), rtol=1e-5, atol=1e-6)
    bank[0], bank[1] = bank[1], bank[0]
    assert torch.equal(logits(model, ids), before)


def test_a_read_expert_is_a_copy_and_a_peek_is_not(qwen):
    bank = moesaic.view(qwen)[0].bank
    copy, peek = bank[2], bank.peek(2)
    bank[2] = copy.map(torch.zeros_like)
    assert copy.up.abs().sum() > 0
    assert peek.up.abs().sum() == 0


def test_bank_runs_sorted_rows(model):
    for block in moesaic.view(model):
        counts = torch.tensor([3, 0, *[1] * (block.num_experts - 2)])
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        x = torch.randn(int(offsets[-1]), block.bank.width)
        with torch.no_grad():
            ours = block.bank(x, offsets)
            rows = torch.arange(block.num_experts).repeat_interleave(counts)
            theirs = torch.stack([block.experts(x[i : i + 1], rows[i].view(1, 1), torch.ones(1, 1))[0] for i in range(len(x))])
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bytes_and_cost_count_one_expert(qwen):
    block = moesaic.view(qwen)[0]
    numbers = sum(tensor.numel() for tensor in block.bank[0].values())
    assert block.expert_bytes == 4 * numbers
    assert block.bank.cost_E.tolist() == [2.0 * numbers] * block.num_experts
    assert block.bank.bytes_E.tolist() == [4.0 * numbers] * block.num_experts


def test_bad_experts_are_refused_and_change_nothing(qwen, ids, logits):
    before = logits(qwen, ids)
    bank = moesaic.view(qwen)[1].bank
    good = bank[0]
    with pytest.raises(BadInput, match=r"layers\.1\.mlp expert 0.*given gate, up$"):
        bank[0] = {"gate": good.gate, "up": good.up}
    with pytest.raises(BadInput, match=r"down must be \[32, 16\], given \[16, 32\]"):
        bank[0] = {**good.map(torch.zeros_like), "down": good.down.T}
    with pytest.raises(BadInput, match=r"torch\.int8.*dequantise"):
        bank[0] = {**good.map(torch.zeros_like), "down": good.down.to(torch.int8)}
    with pytest.raises(IndexError, match="8 experts: no expert 8"):
        bank[8]
    with pytest.raises(BadInput, match="offsets"):
        bank(torch.randn(4, 32), torch.zeros(9, dtype=torch.long))
    with pytest.raises(AttributeError, match="no 'gate_bias': it has gate, up, down"):
        _ = good.gate_bias
    assert torch.equal(logits(qwen, ids), before)


def test_rows_may_share_a_stored_expert(qwen, ids, logits):
    """Router row 1 sent to stored expert 0 equals expert 0's weights copied over expert 1."""
    bank = moesaic.view(qwen)[0].bank
    assert bank.row_to_expert.tolist() == list(range(8))
    bank.row_to_expert = torch.tensor([0, 0, 2, 3, 4, 5, 6, 7])
    shared = logits(qwen, ids)
    bank.row_to_expert = None
    kept = bank[1]
    bank[1] = bank[0]
    torch.testing.assert_close(shared, logits(qwen, ids), rtol=1e-5, atol=1e-6)
    bank[1] = kept
    with pytest.raises(BadInput, match="row_to_expert"):
        bank.row_to_expert = [9] * 8


def test_dense_models_are_named(ids):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from moesaic.core.errors import NotMoE

    config = Qwen3Config(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(NotMoE, match="Qwen3ForCausalLM has no Mixture-of-Experts block"):
        moesaic.view(Qwen3ForCausalLM(config))


def test_shared_experts_and_kinds_are_found(make):
    block = moesaic.view(make("DeepseekV3ForCausalLM"))[0]
    assert block.shared is block.parent.shared_experts
    assert block.shared_bytes == sum(p.numel() * 4 for p in block.parent.shared_experts.parameters())
    assert str(moesaic.view(make("GptOssForCausalLM"))[0].kind) == "gated biased transposed interleaved own_gate"
    assert str(moesaic.view(make("NemotronHForCausalLM"))[0].kind) == "plain relusquared"
