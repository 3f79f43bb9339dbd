"""Card: layers-and-balancing.md, "Barlow Twins": what must hold."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic.balancing.balancer import Scope
from moesaic.balancing.barlow_twins import ExpertDecorrelation, barlow_twins, decorrelation, over_ranks, standardise
from moesaic.core.errors import BadInput
from moesaic.core.routing import Routing
from moesaic.models.reference import ReferenceLM
from moesaic.training.balance import Balance


def naive(y_END):
    """Pair by pair."""
    z = standardise(y_END.double(), 0.0)
    experts, rows, width = z.shape
    pairs = [(a, b) for a in range(experts) for b in range(a + 1, experts)]
    return sum((z[a].T @ z[b] / rows).square().sum() / width**2 for a, b in pairs)


def whitened(rows, width):
    q = torch.linalg.qr(torch.cat([torch.ones(rows, 1), torch.randn(rows, width)], 1).double())[0][:, 1:]
    return q * rows**0.5


def test_equal_whitened_embeddings_have_no_loss():
    z = whitened(64, 8)
    assert barlow_twins(z, z).item() == pytest.approx(0, abs=1e-6)
    assert barlow_twins(z, z.flip(1)).item() > 1


def test_positive_affine_maps_per_feature_change_nothing():
    z1, z2 = torch.randn(64, 8), torch.randn(64, 8)
    moved = z1 * torch.linspace(1, 9, 8) + torch.linspace(-5, 5, 8)
    torch.testing.assert_close(barlow_twins(moved, z2), barlow_twins(z1, z2), rtol=1e-3, atol=1e-4)


def test_identical_experts_and_independent_ones():
    y = torch.randn(200, 16)
    assert decorrelation(y.expand(2, -1, -1), 16).item() >= 1 / 16 - 1e-4
    found = torch.stack([decorrelation(torch.randn(2, 200, 16), 16) for _ in range(20)]).mean().item()
    assert found == pytest.approx(1 / 200, rel=0.2)


def test_no_gradient_when_nothing_correlates():
    z = whitened(64, 8).float()
    y = torch.stack([z[:, :4], z[:, 4:]]).requires_grad_()
    decorrelation(y, 4).backward()
    assert y.grad.abs().max() < 1e-6


@pytest.mark.parametrize(("experts", "rows", "dim"), [(2, 40, 8), (5, 33, 7), (3, 90, 16)])
def test_the_short_way_is_pair_by_pair_and_so_is_the_way_over_ranks(experts, rows, dim):
    y = torch.randn(experts, rows, dim, requires_grad=True)
    want = naive(y)
    grads = []
    for reduce in (None, lambda value: value):
        found = decorrelation(y, dim, reduce)
        torch.testing.assert_close(found.double(), want, rtol=1e-3, atol=1e-6)
        grads.append(torch.autograd.grad(found, y)[0])
    torch.testing.assert_close(grads[0], torch.autograd.grad(want, y)[0], rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-7)


def test_correlations_are_averaged_over_ranks_before_the_square():
    parts = [torch.randn(4, 4, requires_grad=True) for _ in range(2)]
    mean = sum(parts) / 2
    want = torch.autograd.grad(mean.square().sum(), parts)
    for part, grad in zip(parts, want, strict=True):
        reduce = lambda value: torch.tensor(2.0) if value.dim() == 0 else sum(p.detach() for p in parts)  # noqa: E731
        found = over_ranks(part, reduce)
        torch.testing.assert_close(found, mean)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), part)[0] / 2, grad)


def test_the_sample_must_be_larger_than_the_features():
    with pytest.raises(BadInput, match="output_tokens=64"):
        ExpertDecorrelation(output_tokens=64, width=64)
    routing = Routing(torch.randn(3, 2), None, torch.zeros(3, 1).long(), torch.ones(3, 1))
    assert ExpertDecorrelation().loss(routing, Scope()).item() == 0


def test_other_architectures_refuse_it(tiny_moe):
    with pytest.raises(BadInput, match=r"balance\.barlow_twins: .*moesaic's own layers"):
        Balance(AutoModelForCausalLM.from_pretrained(tiny_moe), {"barlow_twins": 0.1})


def test_experts_of_a_model_part_and_recomputation_draws_the_same_sample():
    grads = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        balance = {"barlow_twins": {"coefficient": 1.0, "output_tokens": 24, "width": 8}}
        model = ReferenceLM(dim=32, heads=2, experts=4, balance=balance, checkpoint=checkpoint).train()
        ids = torch.randint(0, 256, (2, 20))
        loss, routings = model(ids, torch.arange(20) < torch.tensor([[20], [9]]))
        assert routings[0].aux["outputs_END"].shape == (4, 24, 32)
        loss.backward()
        grads.append(model.blocks[0].moe.bank.down_EDI.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    seen = []
    for _ in range(15):
        loss, routings = model(ids)
        seen.append(routings[0].aux["loss/barlow_twins"].item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[-1] < seen[0]
