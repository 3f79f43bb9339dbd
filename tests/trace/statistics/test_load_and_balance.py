"""Load and balance: naive counts, closed forms, tables, and intervals that hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from awkward_traces import sets
from hypothesis import given
from hypothesis import strategies as st

from moesaic.core.errors import BadInput
from moesaic.trace.file import from_arrays
from moesaic.trace.statistics.balance import balance, measures
from moesaic.trace.statistics.load import load


def test_counts_equal_a_loop(awkward):
    found = load(awkward, resamples=50)
    for layer, kind in enumerate(awkward.layers):
        ids = awkward.experts_TLK[:, layer]
        want = [(ids == e).sum() for e in range(kind.experts)]
        np.testing.assert_array_equal(found.counts_LE[layer, : kind.experts], want)
        assert (found.counts_LE[layer, kind.experts :] == 0).all()
        assert np.isnan(found.share_LE[layer, kind.experts :]).all()
        if sum(want):
            np.testing.assert_allclose(found.share_LE[layer, : kind.experts], np.array(want) / sum(want))
        assert len(found.by_layer()[layer]["load"]) == kind.experts
    for d in range(len(awkward.domains)):
        rows = awkward.domain_T == d
        assert found.counts_DLE[d].sum() == (awkward.experts_TLK[rows] != awkward.empty).sum()


def test_intervals_hold_the_truth_and_are_wider_where_sequences_differ():
    rng = np.random.default_rng(0)
    loose = from_arrays(sets(6000, 1, 8, 2, rng), 8, lengths=[60] * 100)
    stuck = from_arrays(np.repeat(sets(100, 1, 8, 2, rng), 60, axis=0), 8, lengths=[60] * 100)
    narrow, wide = load(loose), load(stuck)
    inside = (narrow.low_LE < 1 / 8) & (narrow.high_LE > 1 / 8)
    assert inside.sum() >= 6
    assert (wide.high_LE - wide.low_LE).mean() > 4 * (narrow.high_LE - narrow.low_LE).mean()


def test_domains_have_their_own_load_and_one_without_sequences_has_none():
    x = np.repeat([0, 1], [40, 60])[:, None, None]
    trace = from_arrays(x, 3, lengths=[20, 20, 30, 30], domain_S=[0, 0, 2, 2], domains=["a", "none", "c"])
    found = load(trace)
    np.testing.assert_allclose(found.share_DLE[[0, 2], 0], [[1, 0, 0], [0, 1, 0]])
    assert np.isnan(found.share_DLE[1]).all()
    assert found.summary()["choices_by_domain"] == {"a": 40, "none": 0, "c": 60}
    assert load(trace, by_domain=False).domains == ()


def test_closed_forms_of_even_and_one_sided_loads():
    for experts in (1, 3, 64):
        np.testing.assert_allclose(measures(np.full(experts, 7)), [0, 0, 1, 0], atol=1e-12)
    for experts in (3, 64):
        one = np.zeros(experts)
        one[1] = 9
        want = [np.sqrt(experts - 1), (experts - 1) / experts, 0, experts - 1]
        np.testing.assert_allclose(measures(one), want, atol=1e-12)
    assert np.isnan(measures(np.zeros(4))).all()


def test_hand_computed_balance():
    found = balance(np.array([[1, 3, 0, 4]]))
    assert found.cv_L[0] == pytest.approx(np.sqrt(2.5) / 2)
    pairs = [abs(a - b) for a in (1, 3, 0, 4) for b in (1, 3, 0, 4)]
    assert found.gini_L[0] == pytest.approx(sum(pairs) / (2 * 4 * 8))
    p = np.array([1, 3, 4]) / 8
    assert found.entropy_L[0] == pytest.approx(-(p * np.log(p)).sum() / np.log(4))
    assert found.max_violation_L[0] == pytest.approx(1)
    assert found.dead_L[0] == 1 and found.dead_LE[0].tolist() == [False, False, True, False]
    assert balance(np.array([[1, 3, 0, 4]]), dead_below=0.5).dead_L[0] == 2


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=40).filter(any), st.integers(1, 50))
def test_measures_do_not_depend_on_scale_or_order(counts, times):
    x = np.array(counts)
    np.testing.assert_allclose(measures(x * times), measures(x), atol=1e-9)
    np.testing.assert_allclose(measures(np.sort(x)), measures(x), atol=1e-9)
    cv, gini, entropy, violation = measures(x)
    assert cv >= 0 and -1e-9 <= gini < 1 and -1e-9 <= entropy <= 1 + 1e-9 and violation >= -1e-9


def test_layers_with_fewer_experts_and_other_streams_count_only_their_own(awkward):
    found = balance(awkward, resamples=20)
    for layer, kind in enumerate(awkward.layers):
        ids = awkward.experts_TLK[:, layer]
        counts = np.array([(ids == e).sum() for e in range(kind.experts)])
        np.testing.assert_allclose(
            [found.cv_L[layer], found.gini_L[layer], found.entropy_L[layer], found.max_violation_L[layer]], measures(counts)
        )
        assert found.dead_L[layer] == (counts == 0).sum()
        own = np.isin(awkward.sequence_T, np.flatnonzero(awkward.stream_S == awkward.streams.index(kind.stream)))
        assert found.sd_percent_L[layer] == pytest.approx(100 * (counts / own.sum()).std())


@pytest.mark.parametrize(
    "bad", [np.ones(3), -np.ones((1, 3)), np.zeros((1, 3)), {}, {"a": np.ones((1, 3)), "b": np.ones((2, 3))}]
)
def test_tables_that_are_no_counts_are_refused(bad):
    for measure in (load, balance):
        with pytest.raises(BadInput, match="count"):
            measure(bad)


def test_bad_options_are_named():
    with pytest.raises(BadInput, match="dead_below"):
        balance(np.ones((1, 3)), dead_below=1)


@pytest.mark.shared
@pytest.mark.parametrize(("model", "experts"), [("olmoe", 64), ("mixtral", 8)])
def test_real_counts_by_domain(shared, model, experts):
    with np.load(shared / "data/routing" / f"{model}-counts.npz") as data:
        tables = {name.removesuffix(".counts"): data[name] for name in data.files if name.endswith(".counts")}
        pairs = data["c4.pairs"]
    found = load(tables)
    assert found.domains == tuple(tables) and found.share_LE.shape == (3, experts)
    np.testing.assert_allclose(np.nansum(found.share_DLE, 2), 1)
    assert np.isnan(found.low_LE).all()
    np.testing.assert_array_equal(pairs.sum(2)[0], load(tables["c4"]).counts_LE[0])
    even = balance(tables)
    assert (even.entropy_L > 0.9).all() and (even.cv_L > 0.01).all() and (even.dead_L == 0).all()
