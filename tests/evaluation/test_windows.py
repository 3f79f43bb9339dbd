"""Every token scored once, with the context that was promised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.evaluation.windows import batches, windows


@given(st.integers(1, 400), st.integers(1, 64), st.data())
def test_each_token_is_scored_once_with_enough_context(length, context, data):
    stride = data.draw(st.integers(1, context))
    found = list(windows(0, length, context, stride))
    scored = []
    for window in found:
        assert 0 <= window.start < window.end < length
        assert window.length <= context
        for target in range(window.end - window.scored + 1, window.end + 1):
            scored.append(target)
            seen = target - window.start
            assert seen >= min(target, context - stride)
    assert scored == list(range(1, length))


@pytest.mark.parametrize("size", [1, 3, 100])
def test_batches_hold_every_window_longest_first(size):
    found = [w for d in range(5) for w in windows(d, 20 + 7 * d, 16, 5)]
    made = list(batches(found, size))
    assert sorted(w for batch in made for w in batch) == sorted(found)
    assert all(len(batch) <= size for batch in made)
    assert [w.length for batch in made for w in batch] == sorted((w.length for w in found), reverse=True)
