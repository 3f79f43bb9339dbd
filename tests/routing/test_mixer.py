"""Card: routing.md, "MixER": what must hold."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.experts.mlp import Mlp
from moesaic.layers.moe import MoE
from moesaic.routing.mixer import Mixer, assign, k_means, loss_matrix


def three_families(experts=3, each=10, **options):
    """Environments in three far apart groups of contexts, and the losses of experts that fit one group each."""
    router = Mixer(4, experts, environments=3 * each, context=2, **options)
    family_A = torch.arange(3).repeat_interleave(each)
    middles = torch.tensor([[0.0, 4.0], [4.0, 0.0], [-4.0, -4.0]])
    router.context_AC.data = middles[family_A] + 0.1 * torch.randn(3 * each, 2)
    return router, family_A


def choose(router):
    ids = torch.arange(len(router.context_AC))
    return router(torch.randn(len(ids), 4), RoutingContext(task_ids=ids)).experts_TK[:, 0]


def solved(router, loss_AE):
    """Whether it solved; a random start can leave a cluster empty, and the update is then skipped."""
    return any(router.solve(loss_AE, torch.Generator().manual_seed(seed)) for seed in range(50))


def test_separable_contexts_route_as_they_cluster_each_to_its_expert():
    router, family_A = three_families()
    wanted = torch.tensor([2, 0, 1])
    loss_AE = 1.0 - torch.eye(3)[wanted[family_A]]
    assert solved(router, loss_AE)
    assert torch.equal(choose(router), wanted[family_A])
    assert bool(router.has_centroids)


def test_relabelling_experts_permutes_the_columns():
    router, family_A = three_families(noise=0.0)
    loss_AE = torch.rand(30, 3) * 0.1 + 1 - torch.eye(3)[family_A]
    assert solved(router, loss_AE)
    order = torch.tensor([2, 0, 1])
    before = router.gate.clone()
    assert router.solve(loss_AE[:, order])
    torch.testing.assert_close(router.gate, before[:, order], rtol=1e-4, atol=1e-5)


def test_one_expert_is_the_base_learner():
    moe = MoE(4, 1, Mixer(4, 1, environments=2), Mlp(4, 1))
    x = torch.randn(6, 4)
    y, _ = moe(x, RoutingContext(task_ids=torch.arange(6) % 2))
    torch.testing.assert_close(y, moe.bank(x, torch.tensor([0, 6])))


def test_an_empty_cluster_leaves_the_gate_and_forgets_the_centroids():
    router, _ = three_families()
    router.has_centroids.fill_(True)
    router.centroids.copy_(torch.tensor([[0.0, 4.0], [4.0, 0.0], [900.0, 900.0]]))
    before = router.gate.clone()
    assert router.solve(torch.rand(30, 3)) is False
    assert torch.equal(router.gate, before) and not bool(router.has_centroids)


def test_assignment_uses_each_expert_once_and_order_matters():
    cost = torch.tensor([[1.0, 2.0], [1.0, 9.0]])
    assert assign(cost).tolist() == [0, 1]  # greedy: the first cluster takes what the second needs
    assert assign(cost, "optimal").tolist() == [1, 0]
    for _ in range(5):
        assert sorted(assign(torch.rand(6, 6)).tolist()) == list(range(6))
    moved = cost + torch.tensor([0.0, -5.0])
    assert assign(moved).tolist() == [1, 0], "a cheaper column is chosen through that column alone"


def test_k_means_by_mean_absolute_distance():
    x = torch.cat([torch.randn(20, 3) + 8, torch.randn(20, 3) - 8])
    cluster, centroids = k_means(x, torch.tensor([[1.0] * 3, [-1.0] * 3]), 20, 1e-4)
    assert cluster.tolist() == [0] * 20 + [1] * 20
    torch.testing.assert_close(centroids[0], x[:20].mean(0))
    assert k_means(x, torch.tensor([[1.0] * 3, [-1.0] * 3]), 1, 1e-9)[0] is None


def test_no_gradient_reaches_the_gate_and_the_loss_matrix_runs_every_pair():
    router, _ = three_families()
    assert "gate" in router.state_dict() and "gate" not in dict(router.named_parameters())
    assert loss_matrix(lambda a, e: torch.tensor(10.0 * a + e), 2, 3).tolist() == [[0, 1, 2], [10, 11, 12]]
    with pytest.raises(BadInput, match=r"loss_AE \(30, 2\)"):
        router.solve(torch.rand(30, 2))
    with pytest.raises(BadInput, match="assignment="):
        Mixer(4, 9, assignment="optimal")
    with pytest.raises(BadInput, match="task_ids"):
        router(torch.randn(1, 4), RoutingContext(task_ids=torch.tensor([30])))


def test_three_families_of_functions_are_told_apart():
    """The card's small experiment: sines, lines and parabolas; purity 1 and a low error."""
    torch.manual_seed(0)
    router, family_A = three_families(each=5)
    x_N = torch.linspace(-1, 1, 32)
    shapes = torch.stack([torch.sin(4 * x_N), 2 * x_N - 1, 2 * x_N.square()])
    experts = torch.nn.ModuleList(
        torch.nn.Sequential(torch.nn.Linear(1, 24), torch.nn.Tanh(), torch.nn.Linear(24, 1)) for _ in "abc"
    )
    optimizer = torch.optim.Adam(experts.parameters(), lr=2e-2)

    def loss(a, e):
        return (experts[e](x_N[:, None])[:, 0] - shapes[family_A[a]]).square().mean()

    for step in range(150):
        if step % 5 == 0:
            router.solve(loss_matrix(loss, 15, 3))
        chosen = choose(router).tolist()
        optimizer.zero_grad()
        sum(loss(a, chosen[a]) for a in range(15)).backward()
        optimizer.step()
    chosen = choose(router)
    assert all(len(set(chosen[family_A == f].tolist())) == 1 for f in range(3)) and len(set(chosen.tolist())) == 3
    assert max(loss(a, int(chosen[a])).item() for a in range(15)) < 0.02
