"""Specialisation: OpenMoE's laws, its Monte-Carlo baseline, and loops over groups."""

from __future__ import annotations

import numpy as np
import pytest
from awkward_traces import own, sets

from moesaic.core.errors import BadInput
from moesaic.trace.file import from_arrays
from moesaic.trace.statistics.groups import frequent_positions, random_sets
from moesaic.trace.statistics.specialisation import specialisation


@pytest.mark.parametrize("experts", [4, 16, 64])
def test_hash_routing_is_one_hot_and_its_index_is_one(experts):
    tokens = np.random.default_rng(0).integers(0, 20, 6000)
    hashed = (tokens * 7 % experts)[:, None, None]
    found = specialisation(from_arrays(hashed, experts, tokens_T=tokens))
    assert len(found.token.ids_V) == 20
    np.testing.assert_allclose(found.token.score_LV, np.sqrt(experts - 1) / experts)
    assert found.index_L[0] == pytest.approx(1) == found.index_ceiling_L[0]
    led = np.unique(hashed)
    np.testing.assert_allclose(found.vocabulary_LE[0, led], 1)
    assert np.isnan(np.delete(found.vocabulary_LE[0], led)).all()


def test_random_routing_matches_the_monte_carlo_baseline():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 30, 30_000)
    kind = {"lengths": [150] * 200, "domain_S": np.arange(200) % 3, "domains": list("abc")}
    found = specialisation(from_arrays(sets(30_000, 2, 16, 2, rng), 16, tokens_T=tokens, **kind))
    for groups in (found.token, found.domain, found.position):
        np.testing.assert_allclose(groups.mean_L, groups.baseline_L, rtol=0.35)
    assert len(found.position.ids_V) == 150
    expected = np.sqrt(2 / 16 * 14 / 16 / 1000) / 2  # of a group of 1000 tokens
    np.testing.assert_allclose(found.token.baseline_L, expected, rtol=0.1)
    np.testing.assert_allclose(found.index_L, found.index_null_L, rtol=0.05)
    assert (found.index_L >= found.index_floor_L).all() and (found.index_L < 0.1).all()


def test_the_index_lies_between_its_bounds(awkward):
    found = specialisation(awkward, more_than=0)
    known = np.isfinite(found.index_L)
    full = np.array([(awkward.experts_TLK[:, l] != awkward.empty).all() for l in range(len(awkward.layers))])
    assert (found.index_L[known] >= found.index_floor_L[known] - 1e-12).all()
    assert (found.index_L[known & full] <= found.index_ceiling_L[known & full] + 1e-12).all()
    assert (found.index_L[known] <= 1 + 1e-12).all()


def test_ratios_scores_and_index_equal_a_loop_over_groups(awkward):
    found = specialisation(awkward, more_than=2)
    position_T = awkward.position_T
    for name, group_T in (("token", awkward.tokens_T), ("domain", awkward.domain_T), ("position", position_T)):
        groups = getattr(found, name)
        if groups is None:
            assert name == "domain" and not awkward.domains
            continue
        for l, kind in enumerate(awkward.layers):
            rows_T = np.isin(awkward.sequence_T, own(awkward, l))
            largest, weight = 0.0, 0
            for v, g in enumerate(groups.ids_V):
                mine = rows_T & (group_T == g)
                ids = awkward.experts_TLK[mine, l]
                counts = np.array([(ids == e).sum() for e in range(kind.experts)])
                assert groups.tokens_LV[l, v] == mine.sum()
                if mine.sum() <= 2 or not counts.sum():
                    assert np.isnan(groups.score_LV[l, v])
                    continue
                ratio = counts / counts.sum()
                np.testing.assert_allclose(groups.ratio_LVE[l, v, : kind.experts], ratio)
                assert groups.score_LV[l, v] == pytest.approx(ratio.std())
                largest, weight = largest + mine.sum() * ratio.max(), weight + mine.sum()
                if name == "domain":
                    np.testing.assert_allclose(found.domain_rate_LDE[l, g, : kind.experts], counts / mine.sum())
            if name == "token" and weight:
                assert found.index_L[l] == pytest.approx(largest / weight)


def test_rare_groups_are_left_out():
    tokens = np.repeat([3, 9], [129, 128])
    kind = {"lengths": [129, 128], "domain_S": [0, 1], "domains": ["seen", "rare"]}
    found = specialisation(from_arrays(sets(257, 1, 4, 1, np.random.default_rng(0)), 4, tokens_T=tokens, **kind))
    assert found.token.ids_V.tolist() == [3] and found.domain.ids_V.tolist() == [0]
    assert np.isnan(found.domain_rate_LDE[0, 1]).all()
    assert len(found.position.ids_V) == 0 and np.isnan(found.position.mean_L).all()
    assert len(frequent_positions(from_arrays(np.zeros((9, 1, 1), int), 2, lengths=[4, 3, 2]), 1)) == 3


def test_without_token_ids_or_domains_there_is_only_position():
    found = specialisation(from_arrays(sets(300, 1, 4, 1, np.random.default_rng(0)), 4, lengths=[1] * 300))
    assert found.token is None and found.domain is None and len(found.position.ids_V) == 1
    assert np.isnan(found.index_L).all() and set(found.summary()) == {"position"}
    assert found.to_json()["token"] is None


def test_a_domain_with_its_own_experts_stands_out():
    x = np.concatenate([np.zeros((300, 1, 1), int), sets(300, 1, 4, 1, np.random.default_rng(0))])
    found = specialisation(from_arrays(x, 4, lengths=[100] * 6, domain_S=[0] * 3 + [1] * 3, domains=["own", "any"]))
    assert found.domain.score_LV[0, 0] == pytest.approx(np.sqrt(3) / 4)
    assert found.domain.score_LV[0, 1] < 0.1
    np.testing.assert_allclose(found.domain_rate_LDE[0, 0], [1, 0, 0, 0])


@pytest.mark.parametrize(("experts", "slots"), [(3, 2), (64, 8), (100, 3), (4, 4), (2, 3), (1, 1)])
def test_random_sets_are_distinct_and_every_expert_as_likely(experts, slots):
    rows = random_sets(20_000, experts, slots, np.random.default_rng(0))
    wide = min(slots, experts)
    assert (rows[:, wide:] == -1).all()
    order = np.sort(rows[:, :wide], 1)
    assert (order[:, 1:] > order[:, :-1]).all() and order.min() >= 0 and order.max() < experts
    counts = np.bincount(order.ravel(), minlength=experts)
    np.testing.assert_allclose(counts, 20_000 * wide / experts, atol=6 * np.sqrt(20_000 * wide / experts))


def test_bad_options_are_named():
    with pytest.raises(BadInput, match="more_than"):
        specialisation(from_arrays(np.zeros((4, 1, 1), int), 2), more_than=-1)
