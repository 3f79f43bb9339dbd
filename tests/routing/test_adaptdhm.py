"""Card: routing.md, "AdaptDHM": what must hold."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.experts.weight_product import WeightProduct
from moesaic.layers.moe import MoE
from moesaic.routing.adaptdhm import AdaptDHM

TRAIN, EVAL = RoutingContext(mode="train"), RoutingContext()


def test_the_update_is_the_cards_formula_three_times_over():
    router, x = AdaptDHM(6, 3, beta=0.8), torch.randn(20, 6)
    mu = router.centres.clone()
    for _ in range(3):
        r = (x @ mu.T).softmax(-1)
        mu = torch.stack([0.8 * mu[m] + 0.2 * sum(r[i, m] * x[i] for i in range(20)) for m in range(3)])
        mu = mu / mu.norm(dim=1, keepdim=True)
    routing = router(x, TRAIN)
    torch.testing.assert_close(router.centres, mu)
    assert torch.equal(routing.experts_TK[:, 0], (x @ router.centres.T).argmax(1))


@pytest.mark.parametrize("options", [{}, {"mean": True}, {"unit": True}, {"reseed": True}, {"lagged": True}])
def test_centres_keep_unit_norm_and_evaluation_does_not_move_them(options):
    router = AdaptDHM(6, 4, **options)
    for _ in range(5):
        router(5 * torch.randn(30, 6), TRAIN)
        torch.testing.assert_close(router.centres.norm(dim=1), torch.ones(4))
    held = router.centres.clone()
    router(torch.randn(30, 6), EVAL)
    assert torch.equal(router.centres, held)
    assert "centres" in router.state_dict() and not list(router.parameters())


def test_one_expert_is_an_mlp_with_product_weights():
    moe = MoE(6, 1, "adaptdhm").eval()
    bank, x = moe.bank, torch.randn(5, 6)
    inner = (x @ (bank.in_ID * bank.in_EID[0]).T + bank.in_bias_I + bank.in_bias_EI[0]).relu()
    want = inner @ (bank.out_DI * bank.out_EDI[0]).T + bank.out_bias_D + bank.out_bias_ED[0]
    torch.testing.assert_close(moe(x)[0], want)


def test_permuting_centres_with_their_experts_changes_nothing():
    moe, order = MoE(6, 4, "adaptdhm").eval(), torch.tensor([2, 0, 3, 1])
    x = torch.randn(40, 6)
    before = moe(x)[0]
    with torch.no_grad():
        moe.router.centres.copy_(moe.router.centres[order])
        for name in moe.bank.stacked:
            getattr(moe.bank, name).copy_(getattr(moe.bank, name)[order])
    torch.testing.assert_close(moe(x)[0], before)


def test_grouped_execution_equals_all_experts_and_gather():
    moe, x = MoE(6, 4, "adaptdhm").eval(), torch.randn(40, 6)
    y, routing = moe(x)
    every = torch.stack([moe.bank(x, (torch.arange(5) > e) * 40) for e in range(4)])
    torch.testing.assert_close(y, every[routing.experts_TK[:, 0], torch.arange(40)])


def test_large_batches_overwhelm_the_momentum_of_sums_but_not_of_means():
    x = torch.randn(8, 6)
    moved = {}
    for mean in (False, True):
        torch.manual_seed(0)
        one, many = (AdaptDHM(6, 3, mean=mean) for _ in range(2))
        many.centres.copy_(one.centres)
        one(x, TRAIN)
        many(x.repeat(50, 1), TRAIN)
        moved[mean] = (one.centres - many.centres).abs().max()
    assert moved[True] < 1e-5 < 1e-2 < moved[False]


def test_padding_moves_nothing_and_collapsed_clusters_can_be_reseeded():
    x, mask = torch.randn(20, 6), torch.arange(20) < 12
    a, b = AdaptDHM(6, 3), AdaptDHM(6, 3)
    b.centres.copy_(a.centres)
    a(x, TRAIN.replace(mask=mask))
    b(x[:12], TRAIN)
    torch.testing.assert_close(a.centres, b.centres)
    away = normalize(torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]), dim=1)
    rows = torch.randn(30, 3).abs() + torch.tensor([2.0, 0, 0])
    for reseed in (False, True):
        router = AdaptDHM(3, 2, beta=0.999, reseed=reseed)
        router.centres.copy_(away)
        used = router(rows, TRAIN).experts_TK.unique().numel()
        assert used == (2 if reseed else 1)
    with pytest.raises(BadInput, match="beta=1"):
        AdaptDHM(4, 2, beta=1.0)


def test_lagged_routing_uses_the_centres_of_before():
    router, x = AdaptDHM(6, 4, lagged=True), torch.randn(30, 6)
    before = router.centres.clone()
    assert torch.equal(router(x, TRAIN).experts_TK[:, 0], (x @ before.T).argmax(1))
    assert router.causal and not torch.equal(router.centres, before)
    assert not AdaptDHM(6, 4).causal


def test_recomputation_routes_alike_and_moves_once():
    moved = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        moe = MoE(6, 4, "adaptdhm").train()
        x = torch.randn(30, 6, requires_grad=True)
        y = torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=False)[0] if checkpoint else moe(x)[0]
        y.square().sum().backward()
        moved.append((moe.router.centres.clone(), x.grad))
    torch.testing.assert_close(*moved)


def test_bytes_and_shapes():
    bank = WeightProduct(6, 3, 5)
    assert bank.bytes_E.sum() == sum(p.numel() * 4 for p in bank.parameters())
    assert bank(torch.randn(0, 6), torch.zeros(4, dtype=torch.long)).shape == (0, 6)
