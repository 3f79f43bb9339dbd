"""Affinity: perfect and absent affinity, a naive count with weights, tables of real routing."""

from __future__ import annotations

import numpy as np
import pytest
from awkward_traces import chosen, own, sets

from moesaic.core.errors import BadInput
from moesaic.trace.file import from_arrays
from moesaic.trace.statistics.affinity import affinity


def test_a_permutation_of_experts_is_perfect_affinity():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 8, (4000, 1))
    then = rng.permutation(8)
    found = affinity(from_arrays(np.stack([first, then[first], first], 1), 8))
    np.testing.assert_allclose(found.stay_AE, 1)
    np.testing.assert_allclose(found.mutual_bits_A, found.next_bits_A)
    np.testing.assert_allclose(found.mutual_bits_A, 3, atol=0.01)
    assert (found.null_stay_AE[:, 0] < 0.2).all() and (found.null_bits_A < 0.05).all()
    np.testing.assert_array_equal(found.conditional_AEE[0].argmax(1), then)


def test_independent_layers_have_the_chance_value():
    rng = np.random.default_rng(1)
    found = affinity(from_arrays(sets(60_000, 2, 8, 2, rng), 8))
    np.testing.assert_allclose(found.stay_AE[0], np.arange(1, 9) / 8, atol=0.01)
    np.testing.assert_allclose(found.stay_AE, found.null_stay_AE, atol=0.005)
    assert found.mutual_bits_A[0] == pytest.approx(0, abs=0.002)
    assert found.stay(4)[0] == pytest.approx(2 / 8, abs=0.01)
    assert found.stay(1)[0] == pytest.approx(1)


def test_few_tokens_look_affine_and_the_null_says_so():
    found = affinity(from_arrays(sets(200, 2, 32, 2, np.random.default_rng(2)), 32))
    assert found.stay_AE[0, 0] > 2 / 32
    assert found.null_stay_AE[0, 0] == pytest.approx(found.stay_AE[0, 0], rel=0.15)
    assert found.null_bits_A[0] == pytest.approx(found.mutual_bits_A[0], rel=0.15)


def test_every_token_adds_one_and_tables_equal_the_naive_count(awkward):
    found = affinity(awkward)
    for a, (layer, follower) in enumerate(found.pair_A2):
        want = np.zeros((awkward.num_experts,) * 2)
        for s in own(awkward, layer):
            for one, two in zip(chosen(awkward, layer, s), chosen(awkward, follower, s), strict=True):
                for i in one:
                    for j in two:
                        want[i, j] += 1 / len(one) / len(two)
        np.testing.assert_allclose(found.transitions_AEE[a], want)
        if want.sum():
            best = np.sort(want, 1)[:, ::-1]
            np.testing.assert_allclose(found.stay_AE[a, 0], best[:, 0].sum() / want.sum())
            p = want / want.sum()
            parts = [x * np.log2(x / (p[i].sum() * p[:, j].sum())) for (i, j), x in np.ndenumerate(p) if x > 0]
            assert found.mutual_bits_A[a] == pytest.approx(sum(parts))


def test_hand_computed_tables():
    found = affinity(np.array([[[3, 1], [0, 4]]]))
    np.testing.assert_allclose(found.stay_AE[0], [7 / 8, 1])
    np.testing.assert_allclose(found.conditional_AEE[0], [[0.75, 0.25], [0, 1]])
    assert found.mutual_bits_A[0] == pytest.approx(0.5488, abs=1e-4)


def test_encoder_and_decoder_are_not_joined():
    from awkward_traces import TRACES

    np.testing.assert_array_equal(affinity(TRACES["encoder and decoder"]).pair_A2, [[0, 1]])
    assert affinity(TRACES["one expert"]).summary() == {"pairs": 0}


@pytest.mark.parametrize("bad", [np.ones((3, 3)), np.ones((1, 2, 3)), -np.ones((1, 2, 2)), np.zeros((1, 2, 2)), {}])
def test_tables_that_are_no_counts_are_refused(bad):
    with pytest.raises(BadInput, match="pairs"):
        affinity(bad)


@pytest.mark.shared
@pytest.mark.parametrize(("model", "experts"), [("olmoe", 64), ("mixtral", 8)])
def test_real_pair_counts_show_affinity(shared, model, experts):
    with np.load(shared / "data/routing" / f"{model}-counts.npz") as data:
        tables = {name.removesuffix(".pairs"): data[name] for name in data.files if name.endswith(".pairs")}
    found = affinity(tables)
    assert set(tables) == {"arxiv", "c4", "github"} and found.transitions_AEE.shape == (2, experts, experts)
    np.testing.assert_allclose(found.transitions_AEE.sum((1, 2)), sum(t[0].sum() for t in tables.values()))
    assert (found.stay_AE[:, 0] > 1.1 * found.null_stay_AE[:, 0]).all()  # layers 0, 7 and 15 are far apart
    assert (found.mutual_bits_A > 10 * found.null_bits_A).all()
    one = affinity(tables["github"])
    assert (one.stay_AE[:, 0] >= found.stay_AE[:, 0] - 0.05).all()
