"""Slices and merges keep every row's choices, sequence, step, domain and hidden state."""

from __future__ import annotations

import numpy as np
import pytest

from moesaic.core.errors import BadInput
from moesaic.trace.edit import merge, save, select
from moesaic.trace.file import Trace, from_arrays


def make(seed=0, experts=8, lengths=(4, 6, 3), decode=True, domains=("a", "b"), domain_S=(0, 1, 0), **options):
    rng = np.random.default_rng(seed)
    tokens = sum(lengths)
    trace = from_arrays(
        rng.integers(0, experts, (tokens, 3, 2)), experts, lengths=lengths, decode=decode, domains=domains,
        domain_S=domain_S, tokens_T=rng.integers(0, 50, tokens), weights_TLK=rng.random((tokens, 3, 2)), **options,
    )  # fmt: skip
    rows = np.sort(rng.choice(tokens, 5, replace=False))
    hidden = np.repeat(rows[:, None, None], 3, 1).astype(np.float16)
    return Trace(trace.header, {**trace.columns, "hidden_rows": rows, "hidden": hidden})


def same(one, other):
    assert one.columns.keys() == other.columns.keys()
    for name in one.columns:
        assert np.array_equal(one.columns[name], other.columns[name]), name


def test_select_by_domain():
    trace = make()
    part = select(trace, domains="a")
    assert part.lengths_S.tolist() == [4, 3]
    assert np.array_equal(part.tokens_T, np.concatenate([trace.tokens_T[:4], trace.tokens_T[10:]]))
    assert part.step_T.tolist() == [0, 1, 2, 3, 10, 11, 12]
    kept = [r for r in trace.hidden_rows_H if r < 4 or r >= 10]
    assert part.hidden_HLD[:, 0, 0].tolist() == kept
    assert part.hidden_rows_H.tolist() == [r if r < 4 else r - 6 for r in kept]


def test_select_reorders_and_merge_undoes_it():
    trace = make()
    back = merge([select(trace, [2]), select(trace, [0, 1])])
    want = select(trace, [2, 0, 1])
    for name in ("experts", "weights", "tokens", "hidden", "hidden_rows", "sequences"):
        assert np.array_equal(back.columns[name], want.columns[name]), name
    same(select(trace), trace)


def test_merge_of_parts_is_the_whole():
    trace = make()
    whole = merge([select(trace, domains=name) for name in trace.domains])
    assert whole.lengths_S.tolist() == [4, 3, 6]
    assert [whole.domains[d] for d in whole.domain_S] == ["a", "a", "b"]
    assert (np.diff(whole.in_time()) > 0).all()
    assert whole.choices == trace.choices


def test_merge_joins_domains_by_name():
    whole = merge([make(domains=("a", "b")), make(1, domains=("b", "c"))])
    assert whole.domains == ("a", "b", "c")
    assert [whole.domains[d] for d in whole.domain_S] == ["a", "b", "a", "b", "c", "b"]
    assert len(whole.hidden_rows_H) == 10
    assert np.array_equal(whole.hidden_HLD[5:, 0, 0] + 13, whole.hidden_rows_H[5:])


def test_columns_that_some_lack_are_left_out():
    one, two = make(), make(1)
    less = Trace(two.header, {k: v for k, v in two.columns.items() if k not in ("weights", "hidden", "hidden_rows")})
    whole = merge([one, less])
    assert "weights" not in whole.columns
    assert "hidden_rows" not in whole.columns
    assert len(whole) == 26


def test_a_trace_of_another_model_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"layers\.0 with 8 experts, layers\.0 with 16"):
        merge([make(), make(experts=16)])


def test_select_names_what_is_missing():
    with pytest.raises(BadInput, match="no domain 'x': it has a, b"):
        select(make(), domains=["x"])
    with pytest.raises(BadInput, match="sequences 0 to 2"):
        select(make(), [5])


def test_saved_is_the_same(tmp_path):
    trace = make()
    same(save(trace, tmp_path / "a.moetrace"), trace)
    assert [p.name for p in tmp_path.iterdir()] == ["a.moetrace"]
    with pytest.raises(BadInput, match="no folder"):
        save(trace, tmp_path / "none" / "a")
