"""Cards: routing.md, "SkillNet-NLU", "Task-level MoE" and "Post-MoE": routing by what a token belongs to."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.layers.moe import MoE
from moesaic.routing.post_moe import FAMILIES_50, PostMoE
from moesaic.routing.skillnet import NLU_TASKS, SkillNet
from moesaic.routing.task_level import TaskLevel


def equal_experts(moe):
    with torch.no_grad():
        for p in moe.bank.parameters():
            p.copy_(p[:1].expand_as(p))
    return moe


def test_skills_are_averaged_and_equal_modules_are_the_dense_model():
    skills = list(NLU_TASKS.values())
    moe = equal_experts(MoE(16, 7, SkillNet(16, 7, skills)))
    x, tasks = torch.randn(12, 16), torch.arange(12) % 6
    want = moe.bank(x, torch.tensor([0] + [12] * 7))
    y, routing = moe(x, RoutingContext(task_ids=tasks))
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.ones(12))
    for t in range(12):
        assert sorted(e for e in routing.experts_TK[t].tolist() if e >= 0) == list(skills[t % 6])
    only = MoE(16, 7, SkillNet(16, 7, [[6]]), moe.bank)
    torch.testing.assert_close(only(x, RoutingContext(task_ids=torch.zeros(12, dtype=torch.long)))[0], want)


def test_inactive_skills_get_no_gradient_order_and_new_skills_change_nothing():
    moe = MoE(16, 4, SkillNet(16, 4, [[0, 3], [1, 3]])).train()
    x, tasks = torch.randn(6, 16), torch.zeros(6, dtype=torch.long)
    y = moe(x, RoutingContext(mode="train", task_ids=tasks))[0]
    (grad,) = torch.autograd.grad(y.sum(), moe.bank.down_EDI)
    assert [g.abs().sum().item() > 0 for g in grad] == [True, False, False, True]
    turned = MoE(16, 4, SkillNet(16, 4, [[3, 0], [3, 1]]), moe.bank)
    torch.testing.assert_close(turned(x, RoutingContext(task_ids=tasks))[0], y)
    more = MoE(16, 5, SkillNet(16, 5, [[0, 3], [1, 3], [2, 4]]))
    with torch.no_grad():
        for mine, old in zip(more.bank.parameters(), moe.bank.parameters(), strict=True):
            mine[:4] = old
    torch.testing.assert_close(more(x, RoutingContext(task_ids=tasks))[0], y)


def test_a_language_expert_takes_the_last_slot_in_training_only():
    router, x = PostMoE(16, 6), torch.randn(300, 16)
    with torch.no_grad():
        router.score.weight.normal_()
    languages = torch.arange(300) % 7 - 1
    plain = router(x, RoutingContext())
    train = router(x, RoutingContext(mode="train", language_ids=languages))
    assert torch.equal(router(x, RoutingContext(language_ids=languages)).experts_TK, plain.experts_TK)
    assert torch.equal(train.experts_TK[:, 0], plain.experts_TK[:, 0]), "the first choice is never replaced"
    known = languages >= 0
    assert (train.experts_TK == languages.unsqueeze(1)).any(1)[known].all()
    assert torch.equal(train.experts_TK[~known], plain.experts_TK[~known]), "a token of no language keeps its choice"
    had = (plain.experts_TK == languages.unsqueeze(1)).any(1)
    assert had.any() and torch.equal(train.experts_TK[had], plain.experts_TK[had])
    torch.testing.assert_close(train.weights_TK, train.probs_TE.gather(1, train.experts_TK))
    every = PostMoE(16, 6, k=6)
    a, b = every(x, RoutingContext(mode="train", language_ids=languages)), every(x, RoutingContext())
    assert torch.equal(a.experts_TK, b.experts_TK)
    with pytest.raises(MissingNeed, match="language_ids"):
        router(x, RoutingContext(mode="train"))


def test_conversion_keeps_the_function_only_with_renormalised_weights():
    x = torch.randn(20, 16)
    for renormalised in (True, False):
        moe = equal_experts(MoE(16, 6, PostMoE(16, 6, renormalised=renormalised))).eval()
        y, routing = moe(x)
        kept = 1.0 if renormalised else routing.probs_TE.gather(1, routing.experts_TK).sum(1, keepdim=True)
        torch.testing.assert_close(y, kept * moe.bank(x, torch.tensor([0] + [20] * 6)))


def test_families_and_the_language_specific_baseline():
    assert sorted(FAMILIES_50.values()) == list(range(7))
    router = PostMoE(16, 7, k=1, experts_of=[0, 4, 4, 2])
    languages = torch.tensor([0, 1, 2, 3])
    routing = router(torch.randn(4, 16), RoutingContext(mode="train", language_ids=languages))
    assert routing.experts_TK[:, 0].tolist() == [0, 4, 4, 2]
    assert torch.equal(routing.weights_TK, torch.ones(4, 1))
    with pytest.raises(BadInput, match="built for 4"):
        router(torch.randn(1, 16), RoutingContext(mode="train", language_ids=torch.tensor([4])))


def test_a_tasks_route_depends_on_its_vector_alone_and_one_hot_runs_as_sparse():
    router = TaskLevel(16, 3, tasks=4)
    with torch.no_grad():
        router.vector_AC.mul_(100)
    tasks = torch.arange(40) % 4
    contexts = [RoutingContext(mode=mode, task_ids=tasks, step=0) for mode in ("train", "eval")]
    for ctx in contexts:
        routing = router(torch.randn(40, 16), ctx)
        for task in range(4):
            rows = routing.weights_TK[tasks == task]
            assert torch.equal(rows, rows[:1].expand_as(rows)), "tokens of a task share the draw"
    moe, x = MoE(16, 3, router), torch.randn(40, 16)
    torch.manual_seed(5)
    dense = moe(x, contexts[0])
    picked = dense[1].weights_TK.argmax(1)
    for t in range(40):
        offsets = (torch.arange(4) > int(picked[t])).long()
        torch.testing.assert_close(dense[0][t], moe.bank(x[t : t + 1], offsets)[0], rtol=1e-4, atol=1e-5)


def test_temperature_falls_to_its_floor_and_a_huge_one_averages():
    router = TaskLevel(16, 3, tasks=2)
    assert router.temperature(0) == 2.0 and router.temperature(10**6) == 0.1
    assert router.temperature(1000) == pytest.approx(2 * 2.718281828**-0.3)
    soft = TaskLevel(16, 3, tasks=2, mode="softmax", tau=1e6)
    ctx = RoutingContext(mode="train", task_ids=torch.zeros(5, dtype=torch.long), step=0)
    torch.testing.assert_close(soft(torch.randn(5, 16), ctx).weights_TK, torch.full((5, 3), 1 / 3))
    hard = router(torch.randn(5, 16), ctx)
    (grad,) = torch.autograd.grad(hard.weights_TK[:, 0].sum(), router.vector_AC)
    assert grad[0].abs().sum() > 0 and grad[1].abs().sum() == 0


def test_equal_copies_are_the_dense_model_for_any_route():
    x = torch.randn(8, 16)
    ctx = RoutingContext(mode="train", task_ids=torch.arange(8) % 2, step=0)
    for mode in ("softmax", "gumbel", "straight_through"):
        moe = equal_experts(MoE(16, 3, TaskLevel(16, 3, mode=mode)))
        torch.testing.assert_close(moe(x, ctx)[0], moe.bank(x, torch.tensor([0, 8, 8, 8])), rtol=1e-4, atol=1e-5)


def test_refusals():
    with pytest.raises(BadInput, match="skills of task 1"):
        SkillNet(16, 4, [[0], [4]])
    with pytest.raises(BadInput, match="at least one skill"):
        SkillNet(16, 4, [[]])
    with pytest.raises(BadInput, match="built for 2"):
        SkillNet(16, 4)(torch.randn(1, 16), RoutingContext(task_ids=torch.tensor([2])))
    with pytest.raises(BadInput, match="experts_of"):
        PostMoE(16, 4, experts_of=[4])
    with pytest.raises(BadInput, match="mode='top'"):
        TaskLevel(16, 4, mode="top")
