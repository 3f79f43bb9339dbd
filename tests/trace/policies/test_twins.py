"""The compiled policies count what their naive twins count: hits, bytes and evictions."""

from __future__ import annotations

import numpy as np
import pytest
import twins
from hypothesis import given, settings
from hypothesis import strategies as st
from routings import SIZE, build, run, trace_of

from moesaic.trace import simulate as sim
from moesaic.trace.file import from_arrays

CASES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "tokens": st.sampled_from([1, 2, 17, 60]),
        "layers": st.integers(1, 3),
        "experts": st.sampled_from([2, 5, 8]),
        "k": st.integers(1, 2),
        "decode": st.booleans(),
        "stay": st.sampled_from([0.0, 0.7]),
    }
)


def counts(result):
    c = result.count
    return int(c[sim.HITS]), int(c[sim.LOADS]), int(c[sim.STREAMS]), int(c[sim.EVICTIONS])


@settings(max_examples=60, deadline=None)
@given(CASES, st.integers(0, 26), st.sampled_from(["lru", "lfu", "slru"]), st.sampled_from(["layer", "global"]))
def test_recency_and_frequency(case, slots, name, scope):
    trace = trace_of(signals=False, **case)
    policy = build(name, scope=scope)
    result = run(trace, policy, slots)
    held = (policy.state.group[0] // SIZE).tolist()
    kind = {"lru": twins.LRU, "lfu": twins.LFU, "slru": twins.SLRU}[name]
    twin = kind(held if scope == "layer" else held[0])
    for layer, experts in twins.events_of(trace):
        twin.event(layer, experts)
    assert counts(result) == (twin.hits, twin.loads, twin.streams, twin.evictions)
    assert result.moved_bytes == (twin.loads + twin.streams) * SIZE


@settings(max_examples=40, deadline=None)
@given(CASES, st.integers(0, 26))
def test_belady(case, slots):
    trace = trace_of(signals=False, **case)
    result = run(trace, "belady", slots)
    assert result.hits == twins.belady_hits(trace, slots)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(3, 9), st.sampled_from([0.0, 0.5]))
def test_arc_is_arc_where_an_event_is_one_access(seed, slots, experts, stay):
    trace = trace_of(seed, tokens=150, layers=1, experts=experts, k=1, stay=stay)
    slots = min(slots, experts)
    result = run(trace, build("fate", shallow=0), slots)
    twin = twins.ARC(slots)
    hits = sum(twin.access(int(e)) for e in trace.experts_TLK[:, 0, 0]) if slots < experts else result.hits
    assert result.hits == hits


def test_arc_is_lru_when_every_access_is_distinct():
    trace = from_arrays(
        np.arange(200).reshape(200, 1, 1), 200, decode=True, expert_bytes=SIZE, ahead_TLAM=np.full((200, 1, 1, 1), 255)
    )
    fate, lru = run(trace, build("fate", shallow=0), 20), run(trace, "lru", 20)
    assert counts(fate) == counts(lru) == (0, 200, 0, 180)


@pytest.mark.parametrize("name", ["lru", "lfu", "slru", "belady"])
def test_the_block_size_does_not_matter(name, monkeypatch):
    from moesaic.trace.order import Order

    trace = trace_of(3, tokens=90, decode=True)
    whole = run(trace, name, 7)
    blocks = Order.blocks
    monkeypatch.setattr(Order, "blocks", lambda self, trace, choices=0: blocks(self, trace, 40))
    parts = run(trace, name, 7)
    np.testing.assert_array_equal(parts.count_CL, whole.count_CL)
    np.testing.assert_allclose(parts.time, whole.time)
