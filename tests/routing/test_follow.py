"""Numbers of a router that follow a schedule; k of topk by layer and step (card: "Sigma-MoE-Tiny")."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.layers.moe import MoE
from moesaic.routing.topk import TopK
from moesaic.schedules.progressive_sparsification import ProgressiveSparsification

SPARSIFY = {"schedule": "progressive_sparsification", "first": [8, 4, 2, 1], "then": 1, "steps": 100, "switch": 0.9}


def train(step, layer=0):
    return RoutingContext(mode="train", step=step, layer=layer)


def test_a_constant_schedule_equals_a_static_k():
    x = torch.randn(40, 16)
    fixed, scheduled = TopK(16, 8, 3), TopK(16, 8, {"schedule": "constant", "at": 3})
    scheduled.load_state_dict(fixed.state_dict())
    a, b = fixed(x, train(0)), scheduled(x, RoutingContext(mode="train"))
    assert torch.equal(a.experts_TK, b.experts_TK) and torch.equal(a.weights_TK, b.weights_TK)
    assert scheduled.needs == frozenset()


def test_k_follows_layer_and_step_and_sets_are_nested():
    router = TopK(16, 8, SPARSIFY, convention="softmax")
    x = torch.randn(40, 16)
    for layer, k in enumerate([8, 4, 2, 1, 1]):
        before, after = router(x, train(89, layer)), router(x, train(90, layer))
        assert before.experts_TK.shape[1] == k and after.experts_TK.shape[1] == 1
        assert torch.equal(before.experts_TK[:, 0], after.experts_TK[:, 0]), "the last expert is the first of before"
        torch.testing.assert_close(before.weights_TK[:, 0], after.weights_TK[:, 0])


def test_active_pairs_at_each_step_equal_the_schedule():
    schedule = ProgressiveSparsification([8, 4, 2, 1], 1, 100, 0.9)
    router = TopK(16, 8, schedule)
    for step in (0, 89, 90, 200):
        active = sum(router(torch.randn(5, 16), train(step, layer)).experts_TK.shape[1] for layer in range(6))
        assert active == sum(schedule.value(step, layer) for layer in range(6))


def test_evaluation_stands_where_training_stood_also_after_loading():
    router = TopK(16, 8, {"schedule": "steps", "values": [4, 2], "at": [10]})
    x = torch.randn(5, 16)
    assert router(x, RoutingContext()).experts_TK.shape[1] == 4
    router(x, train(10))
    assert router(x, RoutingContext()).experts_TK.shape[1] == 2
    assert router(x, RoutingContext(step=0)).experts_TK.shape[1] == 2, "a host that counts from 0 again changes nothing"
    fresh = TopK(16, 8, {"schedule": "steps", "values": [4, 2], "at": [10]})
    fresh.load_state_dict(router.state_dict())
    assert fresh(x, RoutingContext()).experts_TK.shape[1] == 2


def test_recomputation_and_validation_advance_nothing():
    from torch.utils.checkpoint import checkpoint

    moe = MoE(16, 8, "topk", router_options={"k": {"schedule": "linear", "start": 1, "end": 8, "steps": 7}}).train()
    x = torch.randn(6, 16, requires_grad=True)
    for step in range(9):
        y, routing = checkpoint(moe, x, train(step), use_reentrant=False)
        y.sum().backward()
        moe(x, RoutingContext(step=99))
        assert routing.experts_TK.shape[1] == min(1 + step, 8)
        assert int(moe.router.follow_k.step) == step


def test_capacity_follows_k():
    router = TopK(16, 2, {"schedule": "steps", "values": [2, 1], "at": [10]}, capacity_factor=1.0)
    with torch.no_grad():
        router.score.weight.zero_()
    x = torch.randn(40, 16)
    assert router(x, train(0)).dropped_TK.sum() == 0
    assert router(x, train(10)).dropped_TK.sum() == 20, "all on expert 0, which has room for 40 * 1 / 2"


def test_what_cannot_be_is_refused():
    with pytest.raises(BadInput, match="k=9"):
        TopK(16, 8, {"schedule": "linear", "start": 2, "end": 9, "steps": 10})
    with pytest.raises(BadInput, match="between 1 and 8"):
        TopK(16, 8, {"schedule": "linear", "start": 0, "end": 8, "steps": 10})
    with pytest.raises(MissingNeed, match="step"):
        MoE(16, 8, "topk", host=set(), router_options={"k": SPARSIFY})
    with pytest.raises(MissingNeed, match="schedule of k needs 'step'"):
        MoE(16, 8, "topk", router_options={"k": SPARSIFY}).train()(torch.randn(3, 16))


def test_a_model_s_layers_sparsify_by_their_own_numbers_and_resume(tmp_path):
    from moesaic.models.reference import ReferenceLM

    schedule = {"schedule": "progressive_sparsification", "first": [4, 2], "then": 1, "steps": 4, "switch": 0.5}
    options = {"router_options": {"k": schedule, "convention": "softmax"}, "layers": 3, "dim": 16, "heads": 2, "experts": 4}
    model, ids = ReferenceLM(**options).train(), torch.randint(0, 256, (2, 9))
    for step in range(3):
        slots = [routing.experts_TK.shape[1] for routing in model(ids)[1]]
        assert slots == ([4, 2, 1] if step < 2 else [1, 1, 1])
        assert [r.experts_TK.shape[1] for r in model.eval().hidden(ids)[1]] == slots
        model.train().after_step()
        if step == 1:
            model.language.save_pretrained(tmp_path)
    loaded = type(model.language).from_pretrained(tmp_path)
    assert loaded.config.router_options["k"] == schedule
    assert [int(block.moe.router.follow_k.step) for block in loaded.model.blocks] == [1, 1, 1]
