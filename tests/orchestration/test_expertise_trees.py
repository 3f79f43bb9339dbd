"""Card: routing.md, "Expertise Trees": what must hold."""

from __future__ import annotations

import numpy as np
import pytest

from moesaic.core.errors import BadInput
from moesaic.orchestration.expertise_trees import Combiner, ExpertiseTrees, Node


def play(rounds, max_depth, regions=True, seed=0, **options):
    """Two arms, two advisers, each right in alternate quadrants (or the first everywhere). Rewards of each round."""
    rng = np.random.default_rng(seed)
    trees, rewards = ExpertiseTrees(max_depth=max_depth, **options), []
    for _ in range(rounds):
        context, good = rng.random(2), rng.integers(2)
        right = int((context[0] < 0.5) != (context[1] < 0.5)) if regions else 0
        advice = np.full((2, 2), 0.5)
        for adviser in range(2):
            named = good if adviser == right else 1 - good
            advice[adviser] = np.where(np.arange(2) == named, 0.9, 0.1)
        arm = trees.decide(context, advice)
        rewards.append(float(arm == good))
        trees.learn(rewards[-1])
    return trees, np.array(rewards)


def test_alternate_quadrants_beat_the_global_model():
    _, tree = play(500, 2, alpha=10.0)
    _, flat = play(500, 0, alpha=10.0)
    assert tree[250:].mean() > 0.8
    assert tree[250:].mean() > flat[250:].mean() + 0.2


def test_one_region_ties_the_global_model():
    _, tree = play(300, 2, regions=False)
    _, flat = play(300, 0, regions=False)
    assert tree[150:].mean() > 0.95 and flat[150:].mean() > 0.95


def test_leaves_partition_the_space_bounds_included():
    trees, _ = play(300, 3, alpha=10.0)
    leaves = list(trees.leaves())
    assert len(leaves) > 2
    edges = [0.0, 0.25, 0.5, 0.75, 1.0]
    for x in [*np.random.default_rng(1).random((100, 2)), *[np.array([a, b]) for a in edges for b in edges]]:
        assert sum(leaf.holds(x, trees.root.high_C) for leaf in leaves) == 1
        assert any(trees.leaf(x) is leaf for leaf in leaves)


def test_a_nodes_value_is_the_same_from_scratch():
    trees, _ = play(200, 2, alpha=10.0)
    for leaf in trees.leaves():
        fresh = Node(leaf.low_C, leaf.high_C, Combiner(2, 10.0, 1.0))
        fresh.replay(trees.history[: leaf.replayed], trees.root.high_C)
        assert fresh.value == leaf.value and fresh.seen == leaf.seen
        np.testing.assert_allclose(fresh.combiner.theta, leaf.combiner.theta)


def test_the_global_models_own_replay_has_importance_weight_one():
    trees, rewards = play(100, 0)
    trees.root.replay(trees.history, trees.root.high_C)
    assert trees.root.value == pytest.approx((rewards - 0.5).sum())


def test_permuting_the_advisers_permutes_theta_and_ridge_is_exact():
    rng = np.random.default_rng(0)
    order = np.array([2, 0, 1])
    a, b = Combiner(3, 5.0, 1.0), Combiner(3, 5.0, 1.0)
    rows, targets = [], []
    for _ in range(20):
        advice, arm, reward = rng.random((3, 4)), int(rng.integers(4)), rng.random()
        a.update(advice, arm, reward)
        b.update(advice[order], arm, reward)
        rows.append(np.append(advice[:, arm] - 0.5, 1.0))
        targets.append(reward - 0.5)
    np.testing.assert_allclose(b.theta, np.append(a.theta[:3][order], a.theta[3]), atol=1e-10)
    x = np.array(rows)
    np.testing.assert_allclose(a.theta, np.linalg.solve(x.T @ x + 5 * np.eye(4), x.T @ np.array(targets)), atol=1e-10)


def test_incremental_splits_stay():
    trees, _ = play(120, 1, alpha=10.0, incremental=True)
    held = trees.root.chosen
    for _ in range(5):
        trees.decide(np.array([0.2, 0.2]), np.full((2, 2), 0.5))
        trees.learn(0.0)
    assert held is not None and trees.root.chosen == held


def test_bad_input():
    trees = ExpertiseTrees()
    with pytest.raises(BadInput, match="once after each decision"):
        trees.learn(1.0)
    with pytest.raises(BadInput, match="context"):
        trees.decide(np.array([0.5, 1.5]), np.full((2, 2), 0.5))
    with pytest.raises(BadInput, match="advice of shape"):
        trees.decide(np.array([0.5, 0.5]), np.full((3, 2), 0.5))
    with pytest.raises(BadInput, match="bounds"):
        ExpertiseTrees(bounds=(1.0, 0.0))
