"""Co-activation against a loop over tokens, and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from awkward_traces import chosen, own, sets

from moesaic.core.errors import BadInput
from moesaic.trace.file import from_arrays
from moesaic.trace.statistics.coactivation import coactivation


def test_pairs_equal_a_loop_over_tokens(awkward):
    found = coactivation(awkward)
    for layer in range(len(awkward.layers)):
        want = np.zeros((awkward.num_experts,) * 2, int)
        tokens = [token for s in own(awkward, layer) for token in chosen(awkward, layer, s)]
        for token in tokens:
            for i in token:
                for j in token:
                    want[i, j] += 1
        np.testing.assert_array_equal(found.together_LEE[layer], want)
        assert found.tokens_L[layer] == len(tokens)


def test_hand_computed_case():
    found = coactivation(from_arrays(np.array([[0, 1], [0, 1], [0, 2], [3, 2]])[:, None], 5))
    np.testing.assert_allclose(found.conditional_LEE[0, 0, 1:4], [2 / 3, 1 / 3, 0])
    assert found.conditional_LEE[0, 1, 0] == 1
    assert found.lift_LEE[0, 0, 1] == pytest.approx(2 * 4 / (3 * 2))
    assert np.isnan(found.conditional_LEE[0, 4]).all() and np.isnan(found.lift_LEE[0, 4]).all()
    assert np.isnan(np.diag(found.conditional_LEE[0])).all()
    assert found.strongest(0, 2)[0][:2] in [(0, 1), (2, 3)]


def test_independent_choices_have_the_lift_of_chance():
    found = coactivation(from_arrays(sets(40_000, 1, 8, 3, np.random.default_rng(0)), 8))
    off = ~np.eye(8, dtype=bool)
    assert found.chance_L[0] == pytest.approx(2 * 8 / (3 * 7))
    np.testing.assert_allclose(found.lift_LEE[0][off], found.chance_L[0], rtol=0.05)


def test_one_slot_is_never_together():
    found = coactivation(from_arrays(np.arange(20)[:, None, None] % 4, 4))
    assert found.strongest(0) == [] and found.chance_L[0] == 0


def test_too_many_experts_are_refused_before_memory_runs_out():
    with pytest.raises(BadInput, match="too many experts"):
        coactivation(from_arrays(np.zeros((2, 1, 1), int), 60_000))
