"""The interval: it covers, it is the reversed one, and it says nothing where there is one sequence."""

from __future__ import annotations

import numpy as np
import pytest

from moesaic.core.errors import BadInput
from moesaic.trace.file import from_arrays
from moesaic.trace.statistics.bootstrap import MOST_UNITS, Bootstrap


def mean(sums):
    return sums[..., 0] / sums[..., 1]


def trace_of(sequences, domain_S=None, domains=()):
    return from_arrays(np.zeros((sequences, 1, 1), int), 2, lengths=[1] * sequences, domain_S=domain_S, domains=domains)


def test_the_interval_is_the_reversed_one_of_resampled_sequences():
    rng = np.random.default_rng(0)
    sums = np.stack([rng.exponential(1, 40), np.ones(40)], 1)
    bootstrap = Bootstrap(trace_of(40), 1000)
    low, high = bootstrap.interval(mean, sums)
    by_hand = [mean((w[:, None] * sums).sum(0)) for w in bootstrap.weights_BU]
    x, (q_low, q_high) = mean(sums.sum(0)), np.quantile(by_hand, [0.025, 0.975])
    np.testing.assert_allclose([low, high], [2 * x - q_high, 2 * x - q_low], rtol=1e-5)
    assert (bootstrap.weights_BU.sum(1) == 40).all()


def test_it_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        sums = np.stack([rng.normal(3, 1, 50), np.ones(50)], 1)
        low, high = Bootstrap(trace_of(50), 400, 0.9, seed).interval(mean, sums)
        covered += low < 3 < high
    assert 80 <= covered <= 98


def test_one_sequence_or_no_resamples_give_no_interval():
    for sequences, resamples in ((1, 100), (5, 0)):
        low, high = Bootstrap(trace_of(sequences), resamples).interval(mean, np.ones((sequences, 2)))
        assert np.isnan(low) and np.isnan(high)


def test_a_domain_is_resampled_from_its_own_sequences():
    bootstrap = Bootstrap(trace_of(8, [0, 0, 0, 0, 1, 1, 1, 1], ["a", "b"]))
    sums = np.stack([[1.0] * 4 + [5, 6, 7, 8], np.ones(8)], 1)
    np.testing.assert_allclose(bootstrap.interval(mean, sums, 0), 1)
    low, high = bootstrap.interval(mean, sums, 1)
    assert 4 < low < 6.5 < high < 9


def test_very_many_sequences_are_dealt_to_units_of_one_domain_each():
    domain = np.arange(5 * MOST_UNITS) % 3
    bootstrap = Bootstrap(trace_of(len(domain), domain, list("abc")))
    assert MOST_UNITS - 3 <= bootstrap.units <= MOST_UNITS + 3
    np.testing.assert_array_equal(bootstrap.domain_U[bootstrap.unit_S], domain)
    sums_S = np.random.default_rng(0).normal(3, 1, len(domain))
    sums = np.zeros((bootstrap.units, 2))
    np.add.at(sums, bootstrap.unit_S, np.stack([sums_S, np.ones(len(domain))], 1))
    low, high = bootstrap.interval(mean, sums)
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(len(domain)), rel=0.2)


@pytest.mark.parametrize("options", [{"resamples": -1}, {"confidence": 1.0}, {"confidence": 0}])
def test_bad_options_are_named(options):
    with pytest.raises(BadInput, match=next(iter(options))):
        Bootstrap(trace_of(3), **options)
