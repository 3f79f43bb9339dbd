"""SCH: the card's laws, and a naive twin that simulates a cache of each size as a set."""

from __future__ import annotations

import numpy as np
import pytest
from awkward_traces import chosen, own, sets

from moesaic.core.errors import BadInput
from moesaic.trace.file import from_arrays
from moesaic.trace.statistics.sch import sch


def rows_of(trace, layers, sequence):
    """Choices of each token of a sequence, in slot order: (layer, expert) of all `layers`."""
    a, b = trace.starts_S1[sequence : sequence + 2]
    found = []
    for t in range(a, b):
        row = [(l, int(e)) for l in layers for e in trace.experts_TLK[t, l] if e != trace.empty]
        found.append(list(dict.fromkeys(row)))
    return found


def cache(tokens, size, m):
    """(hits, strict hits, choices) of one sequence, by the definition."""
    held, used, clock = set(), {}, 0
    hits = strict = choices = 0
    for t, token in enumerate(tokens):
        free = size - len(held)
        for x in token:
            choices += 1
            if x in held:
                hits += 1
                strict += 1
            elif x not in used and free > 0:
                hits += 1
                free -= 1
        for k, x in enumerate(token):
            if x not in held:
                if len(held) == size:
                    rest = token[k:] + [y for row in tokens[t + 1 : t + m] for y in row]
                    held.remove(min(held, key=lambda y: (rest.count(y), used[y])))
                held.add(x)
            clock += 1
            used[x] = clock
    return hits, strict, choices


def best_of_windows(tokens, size, m):
    """Choices of each window's favourites, and all of them."""
    kept = active = 0
    for w in range(len(tokens) - m + 1):
        inside = [x for row in tokens[w : w + m] for x in row]
        kept += sum(sorted((inside.count(x) for x in set(inside)), reverse=True)[:size])
        active += len(inside)
    return kept, active


def share(a, b):
    return a / b if b else np.nan


@pytest.mark.parametrize("m", [1, 3, 16])
def test_every_awkward_trace_equals_its_naive_twin(awkward, m):
    found = sch(awkward, windows=[m], rho=[0.5, 1, 1.6], resamples=0)
    for layer in range(len(awkward.layers)):
        sequences = [rows_of(awkward, [layer], s) for s in own(awkward, layer)]
        for c, size in enumerate(found.size_LC[layer]):
            hits, strict, choices = np.sum([cache(tokens, size, m) for tokens in sequences], 0)
            got = [found.sch_LMC[layer, 0, c], found.strict_LMC[layer, 0, c], found.static_LMC[layer, 0, c]]
            static = share(*np.sum([best_of_windows(tokens, size, m) for tokens in sequences], 0))
            np.testing.assert_allclose(got, [share(hits, choices), share(strict, choices), static])
    for z, stream in enumerate(awkward.streams):
        layers = [l for l, layer in enumerate(awkward.layers) if layer.stream == stream]
        sequences = [rows_of(awkward, layers, s) for s in own(awkward, layers[0])]
        for c, size in enumerate(found.model_size_ZC[z]):
            hits, strict, choices = np.sum([cache(tokens, size, m) for tokens in sequences], 0)
            got = [found.model_ZMC[z, 0, c], found.model_strict_ZMC[z, 0, c]]
            np.testing.assert_allclose(got, [share(hits, choices), share(strict, choices)])


def test_constant_routing_always_hits():
    found = sch(from_arrays(np.tile([[1, 4]], (600, 3, 1)), 6, lengths=[300, 300]))
    for table in (found.sch_LMC, found.model_ZMC, found.static_LMC, found.low_LMC):
        np.testing.assert_allclose(table, 1)
    assert (found.strict_LMC < 1).all()


def test_first_uses_while_a_slot_is_free_are_hits_and_later_ones_are_not():
    trace = from_arrays(np.arange(4)[:, None, None], 4)
    found = sch(trace, windows=[4], rho=[1, 2, 3, 4])
    np.testing.assert_allclose(found.sch_LMC[0, 0], [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(found.strict_LMC[0, 0], 0)


def test_hand_computed_case():
    # a b a c b a with room for two: c finds a and b held. Looking 3 tokens ahead, b and a come back once each, and b
    # was used longer ago, so b goes; b then evicts c, which is not needed any more, and the last a is a hit.
    x = np.array([0, 1, 0, 2, 1, 0])[:, None, None]
    found = sch(from_arrays(x, 3), windows=[3], rho=[2])
    assert found.sch_LMC[0, 0, 0] == pytest.approx(4 / 6)
    assert found.strict_LMC[0, 0, 0] == pytest.approx(2 / 6)


def test_it_grows_with_the_cache_and_a_cache_of_everything_always_hits():
    rng = np.random.default_rng(0)
    for sticky in (0.0, 0.7):
        trace = from_arrays(sets(600, 2, 8, 2, rng, sticky), 8, lengths=[200] * 3)
        found = sch(trace, windows=[4, 16, 64], rho=[1, 1.5, 2, 3, 4], resamples=0)
        assert (np.diff(found.sch_LMC, axis=-1) >= 0).all() and (np.diff(found.model_ZMC, axis=-1) >= 0).all()
        np.testing.assert_allclose(found.sch_LMC[..., -1], 1)
        np.testing.assert_allclose(found.model_ZMC[..., -1], 1)


def test_looking_ahead_beats_least_recently_used_on_a_loop_larger_than_the_cache():
    loop = np.arange(300)[:, None, None] % 5
    found = sch(from_arrays(loop, 5), windows=[8], rho=[3], resamples=0)
    assert 0 < found.strict_LMC[0, 0, 0] <= 2 / 4  # LRU never hits here, and Belady (size - 1) / (experts - 1) of the time


def test_an_endless_window_keeps_the_most_frequent():
    rng = np.random.default_rng(1)
    x = rng.choice(6, p=[0.4, 0.4, 0.05, 0.05, 0.05, 0.05], size=2000)[:, None, None]
    found = sch(from_arrays(x, 6), windows=[4000], rho=[3], resamples=0)
    assert found.strict_LMC[0, 0, 0] == pytest.approx(0.8, abs=0.05)


def test_intervals_surround_and_domains_are_apart():
    rng = np.random.default_rng(2)
    x = np.concatenate([np.repeat(sets(20, 2, 8, 2, rng), 20, axis=0), sets(400, 2, 8, 2, rng)])
    trace = from_arrays(x, 8, lengths=[100] * 8, domain_S=[0] * 4 + [1] * 4, domains=["local", "loose"])
    found = sch(trace, windows=[16])
    assert (found.low_LMC < found.sch_LMC).all() and (found.sch_LMC < found.high_LMC).all()
    assert (found.domain_ZDMC[0, 0] > found.domain_ZDMC[0, 1]).all()
    assert found.domain_ZDMC.shape == (1, 2, 1, 2)
    alone = sch(from_arrays(x[:400], 8, lengths=[100] * 4), windows=[16])
    np.testing.assert_allclose(found.domain_ZDMC[0, 0], alone.model_ZMC[0])


@pytest.mark.parametrize("rho", [[0], [-1], [np.inf], []])
def test_bad_sizes_are_named(rho):
    with pytest.raises(BadInput, match="rho"):
        sch(from_arrays(np.zeros((4, 1, 1), int), 2), rho=rho)


def test_naive_rows_are_the_same_sets_as_everywhere(awkward):
    for s in own(awkward, 0):
        assert [{e for _, e in row} for row in rows_of(awkward, [0], s)] == chosen(awkward, 0, s)
