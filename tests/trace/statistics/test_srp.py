"""SRP: the card's worked example and laws, and a naive twin that visits every window and every threshold."""

from __future__ import annotations

import numpy as np
import pytest
from awkward_traces import chosen, own, sets
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.core.errors import BadInput
from moesaic.trace.file import Header, from_arrays
from moesaic.trace.statistics.bootstrap import Bootstrap
from moesaic.trace.statistics.srp import histograms, independent, srp

EXAMPLE = np.array([[0, 1], [0, 2], [0, 1], [1, 3], [0, 1], [2, 3], [0, 1], [0, 3]])[:, None]


def windows_of(trace, layer, m):
    """f of every window and expert: [windows, E]."""
    found = []
    for sequence in own(trace, layer):
        tokens = chosen(trace, layer, sequence)
        for w in range(len(tokens) - m + 1):
            found.append([sum(e in token for token in tokens[w : w + m]) for e in range(trace.layers[layer].experts)])
    return np.array(found).reshape(-1, trace.layers[layer].experts)


def naive(f, m):
    """(SRP, rho) of a bag of f values, by every threshold."""
    f = np.concatenate([x.ravel() for x in f]) if isinstance(f, list) else f.ravel()
    if not f.sum():
        return np.nan, np.nan
    scores = [2 * f[f >= a].sum() / (m * (f >= a).sum() + f.sum()) for a in range(m + 1)]
    alpha = int(np.argmax(scores))
    return scores[alpha], m * (f >= alpha).sum() / f.sum()


def test_the_cards_worked_example():
    found = srp(from_arrays(EXAMPLE, 4), windows=[4])
    assert found.model_ZM[0, 0] == pytest.approx(66 / 92) and round(found.model_ZM[0, 0], 4) == 0.7174
    assert found.model_alpha_ZM[0, 0] == 2
    assert found.model_rho_ZM[0, 0] == pytest.approx(1.3)
    assert found.srp_LM[0, 0] == found.model_ZM[0, 0]


def test_it_is_pooled_and_not_the_mean_of_the_experts_own():
    found = srp(from_arrays(EXAMPLE, 4), windows=[4])
    alone = [naive(windows_of(from_arrays(EXAMPLE, 4), 0, 4)[:, e], 4)[0] for e in range(4)]
    np.testing.assert_allclose(found.srp_LEM[0, :, 0], alone)
    assert abs(np.mean(alone) - found.srp_LM[0, 0]) > 0.01


@pytest.mark.parametrize("m", [1, 2, 4, 16])
def test_every_awkward_trace_equals_its_naive_twin(awkward, m):
    found = srp(awkward, windows=[m], resamples=0)
    every = [windows_of(awkward, layer, m) for layer in range(len(awkward.layers))]
    for layer, f in enumerate(every):
        value, rho = naive(f, m)
        np.testing.assert_allclose([found.srp_LM[layer, 0], found.rho_LM[layer, 0]], [value, rho])
        for e in range(awkward.layers[layer].experts):
            np.testing.assert_allclose(found.srp_LEM[layer, e, 0], naive(f[:, e], m)[0])
    for z, stream in enumerate(awkward.streams):
        f = [f for layer, f in zip(awkward.layers, every, strict=True) if layer.stream == stream]
        np.testing.assert_allclose([found.model_ZM[z, 0], found.model_rho_ZM[z, 0]], naive(f, m))


def test_constant_routing_is_predicted_perfectly():
    trace = from_arrays(np.tile([[1, 4]], (600, 3, 1)), 6, lengths=[300, 300])
    found = srp(trace)
    np.testing.assert_allclose(found.srp_LM, 1)
    np.testing.assert_allclose(found.rho_LM, 1)
    np.testing.assert_allclose(found.low_LM, 1)


def test_the_bound_holds_and_predicting_everything_reaches_it(awkward):
    found = srp(awkward, windows=[1, 4, 16], resamples=0)
    known = np.isfinite(found.srp_LM)
    assert (found.srp_LM[known] >= found.bound_LM[known] - 1e-12).all() and (found.srp_LM[known] <= 1).all()
    known = np.isfinite(found.model_ZM)
    assert (found.model_ZM[known] >= found.model_bound_ZM[known] - 1e-12).all()


def test_random_routing_is_above_the_bound_and_is_the_null():
    assert independent(16, 2 / 16, 16) == pytest.approx(0.319, abs=0.003)
    assert pytest.approx(0.222, abs=1e-3) == 2 * (2 / 16) / (1 + 2 / 16)
    rng = np.random.default_rng(0)
    found = srp(from_arrays(sets(40_000, 1, 16, 2, rng), 16, lengths=[400] * 100), windows=[16])
    assert found.srp_LM[0, 0] == pytest.approx(independent(16, 2 / 16, 16), abs=0.003)
    assert found.srp_LM[0, 0] == pytest.approx(found.null_LM[0, 0], abs=0.003)
    assert found.low_LM[0, 0] < found.null_LM[0, 0] < found.high_LM[0, 0] + 0.003


def test_imbalance_without_locality_raises_only_the_null_with_the_traces_own_loads():
    rng = np.random.default_rng(1)
    skew = np.argsort(rng.random((20_000, 1, 16)) * (1 + 3 * (np.arange(16) > 3)), -1)[..., :2]
    found = srp(from_arrays(skew, 16, lengths=[400] * 50), windows=[16], resamples=0)
    assert found.srp_LM[0, 0] > found.null_LM[0, 0] + 0.1
    assert found.srp_LM[0, 0] == pytest.approx(found.even_LM[0, 0], abs=0.02)


@given(st.integers(0, 10_000), st.sampled_from([2, 4, 8]))
@settings(max_examples=20, deadline=None)
def test_names_of_experts_and_copies_of_the_trace_change_nothing(seed, m):
    rng = np.random.default_rng(seed)
    x = sets(60, 2, 5, 2, rng, 0.6)
    lengths = [25, 3, 32]
    plain = srp(from_arrays(x, 5, lengths=lengths), windows=[m], resamples=0)
    renamed = srp(from_arrays(rng.permutation(5)[x], 5, lengths=lengths), windows=[m], resamples=0)
    copies = srp(from_arrays(np.concatenate([x] * 3), 5, lengths=lengths * 3), windows=[m], resamples=0)
    for other in (renamed, copies):
        np.testing.assert_allclose(other.srp_LM, plain.srp_LM)
        np.testing.assert_allclose(other.model_rho_ZM, plain.model_rho_ZM)


def test_windows_do_not_cross_the_end_of_a_sequence():
    x = np.repeat([[[0]], [[1]]], [10, 10], axis=0)
    apart = srp(from_arrays(x, 2, lengths=[10, 10]), windows=[10], resamples=0)
    joined = srp(from_arrays(x, 2), windows=[10], resamples=0)
    assert apart.srp_LM[0, 0] == 1 and joined.srp_LM[0, 0] < 1
    assert np.isnan(srp(from_arrays(x, 2, lengths=[10, 10]), windows=[11]).srp_LM).all()


def test_a_choice_named_twice_in_a_row_counts_once():
    twice, once = np.array([[[0, 0]], [[0, 1]]] * 8), np.array([[[0, -1]], [[0, 1]]] * 8)
    for m in (1, 4):
        np.testing.assert_allclose(
            srp(from_arrays(twice, 3), windows=[m]).srp_LM, srp(from_arrays(once, 3), windows=[m]).srp_LM
        )


def test_domains_are_pooled_apart_and_blocks_do_not_matter(monkeypatch):
    from moesaic.trace.statistics import rows

    rng = np.random.default_rng(3)
    local, loose = np.repeat(sets(10, 2, 8, 2, rng), 30, axis=0), sets(300, 2, 8, 2, rng)
    header = {"domain_S": [0] * 3 + [1] * 3, "domains": ("local", "loose")}
    trace = from_arrays(np.concatenate([local, loose]), 8, lengths=[100] * 6, **header)
    found = srp(trace, windows=[8])
    assert found.domain_ZDM[0, 0, 0] > 0.9 > 0.6 > found.domain_ZDM[0, 1, 0]
    alone = srp(from_arrays(local, 8, lengths=[100] * 3), windows=[8])
    assert found.domain_ZDM[0, 0, 0] == pytest.approx(alone.model_ZM[0, 0])
    default = rows.sequences.__defaults__
    monkeypatch.setattr(rows.sequences, "__defaults__", (7,))
    again = srp(trace, windows=[8])
    assert default != rows.sequences.__defaults__
    np.testing.assert_array_equal(again.srp_LM, found.srp_LM)
    np.testing.assert_array_equal(again.low_LM, found.low_LM)


def test_histograms_hold_every_window_once(awkward):
    bootstrap = Bootstrap(awkward, 0)
    by_unit, by_expert = histograms(awkward, 3, bootstrap)
    np.testing.assert_array_equal(by_unit.sum(0), by_expert.sum(1))
    for layer, experts in enumerate(awkward.experts_L):
        windows = sum(max(0, awkward.lengths_S[s] - 2) for s in own(awkward, layer))
        assert by_unit[:, layer].sum() == windows * experts


@pytest.mark.parametrize("windows", [[0], [], [4, -1]])
def test_bad_windows_are_named(windows):
    with pytest.raises(BadInput, match="window"):
        srp(from_arrays(EXAMPLE, 4), windows=windows)


def test_a_trace_of_nothing_is_refused():
    empty = from_arrays(EXAMPLE, 4)
    empty.columns["experts"] = empty.experts_TLK[:0]
    empty.columns["runs"] = empty.runs_N4[:0]
    with pytest.raises(BadInput, match="holds no tokens"):
        srp(type(empty)(Header(empty.layers), empty.columns))
