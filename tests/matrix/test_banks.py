"""What every registered bank earns by existing."""

from __future__ import annotations

from math import isqrt

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.core import registry
from moesaic.core.errors import BadInput
from moesaic.core.routing import Dispatch
from moesaic.experts.bank import ExpertBank

BANKS = [entry.name for entry in registry.entries("experts")]
DIM = 16


def count(name, experts=6):
    """An expert count that the bank can have, near `experts`."""
    return isqrt(experts) ** 2 if registry.get("experts", name).facts.get("square") else experts


def build(name, experts=6, dtype=torch.float32):
    bank = registry.get("experts", name).build(DIM, count(name, experts))
    for p in bank.parameters():  # banks that start as a no-op would compare zeros with zeros
        torch.nn.init.normal_(p, std=0.3)
    return bank.to(dtype)


def random_dispatch(tokens, experts, k, only=None):
    ids = torch.randint(0, experts, (tokens, k)) if only is None else torch.full((tokens, k), only)
    ids[torch.rand(tokens, k) < 0.2] = -1
    return Dispatch.of_slots(ids, torch.rand(tokens, k, requires_grad=True), experts)


def naive(bank, x_TD, dispatch):
    out = [0 * row for row in x_TD]
    for t, e, w in zip(dispatch.token_S, dispatch.expert_S, dispatch.weight_S, strict=True):
        offsets = (torch.arange(bank.num_experts + 1) > int(e)).long()
        out[int(t)] = out[int(t)] + w * bank(x_TD[int(t) : int(t) + 1], offsets)[0]
    return torch.stack(out)


@pytest.mark.parametrize("name", BANKS)
@pytest.mark.parametrize(("tokens", "experts", "only"), [(1, 6, None), (63, 6, None), (9, 64, None), (17, 6, 3)])
def test_run_and_all_gradients_equal_one_pair_at_a_time(name, tokens, experts, only):
    bank = build(name, experts)
    experts = len(bank)
    x = torch.randn(tokens, DIM, requires_grad=True)
    dispatch = random_dispatch(tokens, experts, 2, only)
    y, want = bank.run(x, dispatch), naive(bank, x, dispatch)
    torch.testing.assert_close(y, want, rtol=1e-3, atol=1e-4)
    seed = torch.randn_like(y)
    wanted = [x, dispatch.weight_S, *bank.parameters()]
    got = torch.autograd.grad(y, wanted, seed, allow_unused=True)
    expected = torch.autograd.grad(want, wanted, seed, allow_unused=True)
    for parameter, a, b in zip(wanted, got, expected, strict=True):
        zero = torch.zeros_like(parameter)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", BANKS)
def test_nothing_routed_is_zero(name):
    bank = build(name)
    dispatch = Dispatch.of_slots(torch.full((5, 2), -1), torch.ones(5, 2), count(name))
    assert torch.equal(bank.run(torch.randn(5, DIM), dispatch), torch.zeros(5, DIM))


@pytest.mark.parametrize("name", BANKS)
def test_bfloat16_determinism_and_saving(name, tmp_path):
    bank = build(name, dtype=torch.bfloat16).eval()
    x, dispatch = torch.randn(100, DIM).bfloat16(), random_dispatch(100, count(name), 2)
    y = bank.run(x, dispatch)
    assert y.dtype == torch.bfloat16
    assert torch.equal(bank.run(x, dispatch), y)
    save_file({k: v.contiguous() for k, v in bank.state_dict().items()}, tmp_path / "bank.safetensors")
    other = build(name, dtype=torch.bfloat16)
    other.load_state_dict(load_file(tmp_path / "bank.safetensors"))
    assert torch.equal(other.run(x, dispatch), y)


@pytest.mark.parametrize("name", BANKS)
def test_costs_sizes_and_reading(name):
    bank = build(name)
    assert bank.cost_E.shape == bank.bytes_E.shape == (count(name),)
    assert (bank.cost_E >= 0).all() and bank.cost_E.max() > 0
    own = sum(p.numel() * p.element_size() for p in bank.parameters())
    assert bank.bytes_E.sum().item() == pytest.approx(own, rel=1e-12)  # parts that experts share count in shares
    assert isinstance(bank, ExpertBank) and len(bank) == count(name)
    tensors = {k: v.detach().clone() for k, v in bank[2].items()}
    bank[2] = {k: v + 1 for k, v in tensors.items()}
    for key, value in bank[2].items():
        torch.testing.assert_close(value.detach(), tensors[key] + 1)


@pytest.mark.parametrize("name", BANKS)
def test_merge_with_one_hot_weights_or_a_clear_refusal(name):
    bank = build(name)
    if not bank.stacked:
        with pytest.raises(BadInput, match="cannot merge"):
            bank.merge(torch.ones(1, len(bank)))
        return
    x = torch.randn(7, DIM)
    merged = bank.merge(torch.eye(6)[4:5])
    torch.testing.assert_close(merged(x, torch.tensor([0, 7])), bank(x, torch.tensor([0, 0, 0, 0, 0, 7, 7])))
