"""Reuse: every LRU size against a cache that is a list, working sets against sets, and hand-computed distances."""

from __future__ import annotations

import numpy as np
import pytest
from awkward_traces import chosen, own, sets

from moesaic.trace.file import from_arrays
from moesaic.trace.replay import replay
from moesaic.trace.statistics.reuse import reuse


def lru(trace, layer, size):
    """(hits, hits with free slots, choices): a token's experts are looked up together and stay while it runs."""
    hits = warm = choices = 0
    for s in own(trace, layer):
        a, b = trace.starts_S1[s : s + 2]
        held, ever = [], set()
        for t in range(a, b):
            token = list(dict.fromkeys(int(e) for e in trace.experts_TLK[t, layer] if e != trace.empty))
            free = size - len(held)
            for e in token:
                choices += 1
                hits += e in held
                warm += e in held
                if e not in ever and free > 0:
                    warm += 1
                    free -= 1
                ever.add(e)
            for e in reversed(token):
                if e in held:
                    held.remove(e)
                held.append(e)
            held = held[-size:]
    return hits, warm, choices


def test_every_size_equals_its_naive_twin(awkward):
    found = reuse(awkward, rho=[1, 1.5], resamples=0)
    for layer, kind in enumerate(awkward.layers):
        for size in {kind.top_k, kind.top_k + 1, kind.experts // 2, kind.experts} - {0}:
            if size > kind.experts:
                continue
            hits, warm, choices = lru(awkward, layer, size)
            assert found.lru_LE[layer, size - 1] == pytest.approx(hits / choices)
            assert found.warm_LE[layer, size - 1] == pytest.approx(warm / choices)
        for c, size in enumerate(found.size_LC[layer]):
            assert found.hit_LC[layer, c] == pytest.approx(found.lru_LE[layer, size - 1])
        assert np.isnan(found.lru_LE[layer, kind.experts :]).all()
        assert found.distance_LE[layer].sum() + found.first_L[layer] == found.choices_L[layer]


def test_working_sets_equal_sets(awkward):
    found = reuse(awkward, resamples=0)
    for layer in range(len(awkward.layers)):
        for n, got in zip(found.tokens_N, found.working_set_LN[layer], strict=True):
            sizes = []
            for s in own(awkward, layer):
                tokens = chosen(awkward, layer, s)
                sizes += [len(set().union(*tokens[w : w + n])) for w in range(len(tokens) - n + 1)]
            np.testing.assert_allclose(got, np.mean(sizes) if sizes else np.nan)


def test_hand_computed_distances():
    # a b a c c b: a comes back over b (place 1), c at once (place 0), b over c and a (place 2)
    found = reuse(from_arrays(np.array([0, 1, 0, 2, 2, 1])[:, None, None], 4), rho=[1, 2], resamples=0)
    np.testing.assert_array_equal(found.distance_LE[0], [1, 1, 1, 0])
    assert found.first_L[0] == 3
    np.testing.assert_allclose(found.lru_LE[0], [1 / 6, 2 / 6, 3 / 6, 3 / 6])
    np.testing.assert_allclose(found.warm_LE[0], [2 / 6, 4 / 6, 1, 1])
    np.testing.assert_allclose(found.away_LN[0], [1 / 3, 2 / 3, 1])  # within 1, 2 and 4 tokens


def test_it_is_what_the_replay_of_an_lru_cache_counts():
    rng = np.random.default_rng(0)
    trace = from_arrays(sets(400, 2, 16, 4, rng, 0.5), 16, decode=True, expert_bytes=100)
    found = reuse(trace, resamples=0)
    for size in (4, 5, 8, 15, 16):
        run = replay(trace, "lru", size * 2 * 100)
        np.testing.assert_allclose(run.hit_rate_L, found.lru_LE[:, size - 1])


def test_a_loop_larger_than_the_cache_never_hits_and_one_that_fits_always_does():
    found = reuse(from_arrays(np.arange(300)[:, None, None] % 5, 5), resamples=0)
    np.testing.assert_allclose(found.lru_LE[0], [0, 0, 0, 0, 295 / 300])


def test_nothing_is_reused_across_the_end_of_a_sequence():
    x = np.zeros((10, 1, 1), int)
    assert reuse(from_arrays(x, 3, lengths=[1] * 10)).first_L[0] == 10
    assert reuse(from_arrays(x, 3)).first_L[0] == 1
