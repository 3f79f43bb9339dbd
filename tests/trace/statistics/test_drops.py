"""Drops: OpenMoE's laws on capacity, and a loop over choices."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
from awkward_traces import chosen, own, sets

from moesaic.core.errors import BadInput
from moesaic.trace.file import from_arrays
from moesaic.trace.statistics.drops import drops


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.5])
def test_it_equals_a_loop_over_choices(awkward, factor):
    found = drops(awkward, capacity_factors=[factor], bins=3, resamples=0)
    lost, every = np.zeros((len(awkward.layers), 3)), np.zeros((len(awkward.layers), 3))
    for layer, kind in enumerate(awkward.layers):
        for s in own(awkward, layer):
            tokens = chosen(awkward, layer, s)
            capacity = ceil(round(factor * kind.top_k * len(tokens) / kind.experts, 9))
            count = dict.fromkeys(range(kind.experts), 0)
            for t, token in enumerate(tokens):
                for e in token:
                    every[layer, t * 3 // len(tokens)] += 1
                    lost[layer, t * 3 // len(tokens)] += count[e] >= capacity
                    count[e] += 1
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found.dropped_FL[0], lost.sum(1) / every.sum(1))
        np.testing.assert_allclose(found.position_FB[0], lost.sum(0) / every.sum(0))
    assert found.dropped_F[0] == pytest.approx(lost.sum() / every.sum())


def test_more_capacity_than_experts_can_use_drops_nothing(awkward):
    factor = max(kind.experts / kind.top_k for kind in awkward.layers)
    found = drops(awkward, capacity_factors=[factor, 2 * factor], resamples=0)
    np.testing.assert_array_equal(found.dropped_F, 0)


@pytest.mark.parametrize(("experts", "k", "length"), [(3, 1, 10), (12, 7, 108), (17, 3, 85), (10, 3, 7)])
def test_a_capacity_that_is_a_whole_number_is_not_rounded_up(experts, k, length):
    x = np.tile(np.arange(k), (length, 1, 1))
    found = drops(from_arrays(x, experts), capacity_factors=[1.0], resamples=0)
    capacity = -(-k * length // experts)
    assert found.dropped_F[0] == pytest.approx(1 - min(capacity, length) / length)


def test_drops_grow_towards_the_end_of_a_stationary_sequence():
    rng = np.random.default_rng(0)
    skew = np.argsort(rng.random((40_000, 1, 8)) * (1 + np.arange(8)), -1)[..., -2:]
    found = drops(from_arrays(skew, 8, lengths=[400] * 100), capacity_factors=[1.0, 1.5], bins=8)
    assert (np.diff(found.position_FB, axis=1) >= -0.01).all()
    assert (found.position_FB[:, 0] == 0).all() and (found.position_FB[0, -1] > 0.3)
    assert (found.position_low_FB[0, -1] < found.position_FB[0, -1] < found.position_high_FB[0, -1]).all()
    assert (np.diff(found.dropped_F) < 0).all()


def test_one_byte_repeated_is_dropped_from_where_its_expert_is_full():
    trace = from_arrays(np.full((160, 1, 1), 3), 16, tokens_T=np.full(160, 97))
    found = drops(trace, capacity_factors=[1.0], bins=16)
    np.testing.assert_array_equal(found.position_FB[0], [0] + [1] * 15)


def test_capacity_is_per_sequence_and_domains_are_apart():
    rng = np.random.default_rng(1)
    x = np.concatenate([np.zeros((100, 1, 1), int), np.arange(100)[:, None, None] % 4, sets(100, 1, 4, 1, rng)])
    kind = {"domain_S": [0, 1, 2], "domains": ["stuck", "even", "random"]}
    found = drops(from_arrays(x, 4, lengths=[100] * 3, **kind), capacity_factors=[1.0], bins=4)
    np.testing.assert_allclose(found.domain_FD[0, :2], [0.75, 0])
    assert 0 < found.domain_FD[0, 2] < 0.2
    np.testing.assert_array_equal(found.domain_position_FDB[0, 0], [0, 1, 1, 1])


@pytest.mark.parametrize("options", [{"capacity_factors": [0]}, {"capacity_factors": []}, {"bins": 0}])
def test_bad_options_are_named(options):
    with pytest.raises(BadInput, match=r"capacity factor|bins"):
        drops(from_arrays(np.zeros((4, 1, 1), int), 2), **options)
