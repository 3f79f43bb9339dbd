"""Card: routing.md, "M3ViT": what must hold."""

from __future__ import annotations

import pytest
import torch

from moesaic.balancing.balancer import Scope
from moesaic.balancing.importance import Importance
from moesaic.balancing.smooth_load import SmoothLoad
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.layers.moe import MoE
from moesaic.routing.m3vit import M3ViT


def ctx(tasks, mode="eval"):
    return RoutingContext(mode=mode, task_ids=torch.as_tensor(tasks))


@pytest.mark.parametrize("gate", ["multi_gate", "conditioned"])
def test_the_task_changes_the_routing_and_equal_gates_do_not(gate):
    router, x = M3ViT(16, 8, 2, tasks=3, gate=gate), torch.randn(40, 16)
    if gate == "conditioned":
        with torch.no_grad():
            router.weight.mul_(20)
    a, b = (router(x, ctx([task] * 40)) for task in (0, 2))
    assert not torch.equal(a.experts_TK, b.experts_TK)
    mixed = router(x, ctx(torch.arange(40) % 3))
    assert torch.equal(mixed.experts_TK[::3], a.experts_TK[::3]) and torch.equal(mixed.experts_TK[2::3], b.experts_TK[2::3])
    assert (a.weights_TK.sum(1) <= 1).all()
    with torch.no_grad():
        if gate == "multi_gate":
            router.weight.copy_(router.weight[:1].expand_as(router.weight))
        else:
            router.task[-1].weight.zero_()
    assert torch.equal(router(x, ctx([0] * 40)).experts_TK, router(x, ctx([2] * 40)).experts_TK)


def test_a_task_embedding_of_zero_is_the_plain_gate():
    router, x = M3ViT(16, 8, 2, gate="conditioned"), torch.randn(40, 16)
    with torch.no_grad():
        router.task[-1].weight.zero_()
        router.task[-1].bias.zero_()
    torch.testing.assert_close(router(x, ctx([1] * 40)).logits_TE, x @ router.weight[0, :, :16].T)
    with torch.no_grad():
        router.task[-1].bias.normal_()
    shift = router(x, ctx([1] * 40)).logits_TE - x @ router.weight[0, :, :16].T
    torch.testing.assert_close(shift, shift[:1].expand(40, -1), atol=1e-5, rtol=0)


def test_noise_is_of_the_stated_size_and_for_training_only():
    router, x = M3ViT(16, 8, 2, noise_std=4.0), torch.randn(4000, 16)
    tasks = [0] * 4000
    noise = router(x, ctx(tasks, "train")).logits_TE - router(x, ctx(tasks)).logits_TE
    assert noise.std().item() == pytest.approx(4.0 / 8, rel=0.05)
    routing = router(x, ctx(tasks, "train"))
    assert SmoothLoad().loss(routing, Scope()) > 0 and Importance().loss(routing, Scope()) > 0
    assert not M3ViT(16, 8, 2, noise_std=0)(x, ctx(tasks, "train")).aux


def test_ranges_and_pruning():
    router, x = M3ViT(16, 8, 2, ranges=[(0, 4), (3, 8)], prune=0.15), torch.randn(60, 16)
    tasks = torch.arange(60) % 2
    routing = router(x, ctx(tasks))
    assert (routing.experts_TK[tasks == 0] < 4).all()
    assert ((routing.experts_TK[tasks == 1] >= 3) | (routing.experts_TK[tasks == 1] == -1)).all()
    kept = routing.experts_TK >= 0
    assert (routing.weights_TK[kept] >= 0.15).all() and (routing.weights_TK[~kept] == 0).all()


def test_sparse_execution_equals_token_by_token():
    moe, x = MoE(16, 8, "m3vit", router_options={"k": 3}), torch.randn(20, 16)
    y, routing = moe(x, ctx([1] * 20))
    for t in range(20):
        parts = [
            w * moe.bank(x[t : t + 1], (torch.arange(9) > e).long())[0]
            for e, w in zip(routing.experts_TK[t].tolist(), routing.weights_TK[t], strict=True)
        ]
        torch.testing.assert_close(y[t], sum(parts), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused():
    for options, says in (
        ({"k": 9}, "k=9"),
        ({"gate": "hard"}, "gate='hard'"),
        ({"ranges": [(0, 8)]}, "1 entries for 2 tasks"),
        ({"k": 4, "ranges": [(0, 3), (0, 8)]}, "holds no k=4"),
    ):
        with pytest.raises(BadInput, match=says):
            M3ViT(16, 8, **options)
    with pytest.raises(MissingNeed, match="task_ids"):
        MoE(16, 8, "m3vit", host=set())
    with pytest.raises(BadInput, match="0 to 1"):
        M3ViT(16, 8)(torch.randn(3, 16), ctx([0, 1, 2]))
