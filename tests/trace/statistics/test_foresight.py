"""Foresight: a loop over tokens, perfect and blind look-ahead, and a trace that was recorded without it."""

from __future__ import annotations

import numpy as np
import pytest
from awkward_traces import sets

from moesaic.trace.file import from_arrays
from moesaic.trace.statistics.foresight import foresight
from moesaic.trace.statistics.result import NotRecorded


def test_it_equals_a_loop_over_tokens():
    rng = np.random.default_rng(0)
    x = sets(80, 3, 9, 2, rng)
    x[5, 1, 1] = -1
    ahead = np.stack([np.stack([sets(80, 1, 9, 4, rng)[:, 0] for _ in range(2)], 1) for _ in range(3)], 1)
    found = foresight(from_arrays(x, 9, lengths=[30, 50], ahead_TLAM=ahead))
    assert found.widths_W.tolist() == [2, 4]
    counts = [np.bincount(x[:, l][x[:, l] >= 0], minlength=9) for l in range(3)]
    for l in range(3):
        for i, w in enumerate((2, 4)):
            hit = dict.fromkeys(("one", "two", "previous", "usual"), 0)
            total = 0
            usual = np.argsort(-counts[l], kind="stable")[:w]
            for t in range(80):
                start = 0 if t < 30 else 30
                before = [e for s in range(t - 1, start - 1, -1) for e in x[s, l]][:w]
                for e in x[t, l]:
                    if e < 0:
                        continue
                    total += 1
                    hit["one"] += l >= 1 and e in ahead[t, l - 1, 0, :w]
                    hit["two"] += l >= 2 and e in ahead[t, l - 2, 1, :w]
                    hit["previous"] += e in [b for b in before if b >= 0]
                    hit["usual"] += e in usual
            assert found.previous_LW[l, i] == pytest.approx(hit["previous"] / total)
            assert found.frequent_LW[l, i] == pytest.approx(hit["usual"] / total)
            for a, name in enumerate(("one", "two")):
                if l > a:
                    assert found.ahead_LAW[l, a, i] == pytest.approx(hit[name] / total)
                    assert found.low_LAW[l, a, i] < found.ahead_LAW[l, a, i] < found.high_LAW[l, a, i]
                else:
                    assert np.isnan(found.ahead_LAW[l, a, i])


def test_perfect_and_blind_look_ahead():
    x = sets(60, 2, 8, 2, np.random.default_rng(1))
    perfect = np.full((60, 2, 1, 4), -1)
    perfect[:, 0, 0, :2] = x[:, 1]
    assert foresight(from_arrays(x, 8, ahead_TLAM=perfect)).ahead_LAW[1, 0].tolist() == [1, 1]
    blind = np.full((60, 2, 1, 4), -1)
    assert foresight(from_arrays(x, 8, ahead_TLAM=blind)).ahead_LAW[1, 0].tolist() == [0, 0]


def test_constant_routing_is_known_from_the_token_before():
    found = foresight(from_arrays(np.tile([1, 4], (40, 3, 1)), 8, ahead_TLAM=np.full((40, 3, 1, 4), -1)))
    np.testing.assert_allclose(found.previous_LW[:, 0], 39 / 40)
    np.testing.assert_allclose(found.frequent_LW, 1)
    np.testing.assert_allclose(found.chance_LW, [[0.25, 0.5]] * 3)


def test_recall_grows_with_the_width_to_one():
    """Recall does not fall as more experts are named, and is 1 when all are."""
    rng = np.random.default_rng(2)
    x = sets(50, 2, 4, 2, rng)
    ahead = np.stack([sets(50, 2, 4, 4, rng)], 2)
    found = foresight(from_arrays(x, 4, ahead_TLAM=ahead))
    assert found.ahead_LAW[1, 0, 0] < found.ahead_LAW[1, 0, 1] == 1


def test_it_wants_look_ahead():
    with pytest.raises(NotRecorded, match="--lookahead"):
        foresight(from_arrays(np.zeros((5, 2, 1), int), 2))
