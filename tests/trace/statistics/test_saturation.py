"""Saturation: a naive count, closed forms, and traces that must not be compared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from awkward_traces import chosen, own, sets

from moesaic.core.errors import BadInput
from moesaic.trace.file import Trace, from_arrays
from moesaic.trace.statistics.saturation import saturation


def test_a_trace_agrees_with_itself(awkward):
    found = saturation(awkward, awkward, resamples=20)
    some = [any(chosen(awkward, l, s) for s in own(awkward, l)) for l in range(len(awkward.layers))]
    np.testing.assert_allclose(found.overlap_L[some], 1)
    np.testing.assert_allclose(found.first_L[some], 1)


def test_overlap_equals_sets_whatever_the_order_of_slots():
    rng = np.random.default_rng(0)
    x, y = sets(300, 2, 6, 3, rng), sets(300, 2, 6, 3, rng)
    x[:40, 0, 2] = -1
    one, two = from_arrays(x, 6, lengths=[100] * 3), from_arrays(y, 6, lengths=[100] * 3)
    found, turned = saturation(one, two), saturation(one, from_arrays(y[..., ::-1], 6, lengths=[100] * 3))
    for layer in range(2):
        pairs = [(set(a) - {-1}, set(b)) for a, b in zip(x[:, layer].tolist(), y[:, layer].tolist(), strict=True)]
        want = sum(len(a & b) for a, b in pairs) / sum(len(a) for a, _ in pairs)
        assert found.overlap_L[layer] == pytest.approx(want) == turned.overlap_L[layer]
        assert found.low_L[layer] < want < found.high_L[layer]
        assert found.first_L[layer] == pytest.approx((x[:, layer, 0] == y[:, layer, 0]).mean())
    assert found.chance_L[1] == pytest.approx(0.5) and found.overlap_L[1] == pytest.approx(0.5, abs=0.06)


def test_the_first_choice_is_the_largest_weight_where_weights_are_recorded():
    x = np.array([[[0, 1, 2]], [[2, 3, 0]]])
    one = from_arrays(x, 4, weights_TLK=[[[0.2, 0.5, 0.3]], [[0.6, 0.3, 0.1]]])
    two = from_arrays(x[..., ::-1], 4, weights_TLK=[[[0.1, 0.6, 0.3]], [[0.3, 0.2, 0.5]]])
    assert saturation(one, two).first_L[0] == 1  # 1 and 1; 2 and 2: the smallest weights and the first slots differ
    assert saturation(from_arrays(x, 4), from_arrays(x[..., ::-1], 4)).first_L[0] == 0


def test_domains_are_apart():
    x = np.zeros((40, 1, 1), int)
    y = x.copy()
    y[20:] = 1
    kind = {"lengths": [10] * 4, "domain_S": [0, 0, 1, 1], "domains": ["same", "other"]}
    found = saturation(from_arrays(x, 2, **kind), from_arrays(y, 2, **kind))
    np.testing.assert_allclose(found.overlap_DL[:, 0], [1, 0])
    assert found.overlap_L[0] == 0.5


def base():
    return from_arrays(sets(30, 2, 6, 2, np.random.default_rng(0)), 6, lengths=[10, 20], tokens_T=np.arange(30))


def other(**changes):
    rng = np.random.default_rng(1)
    kind = {"tokens": 30, "layers": 2, "experts": 6, "lengths": [10, 20], "tokens_T": np.arange(30)} | changes
    x = sets(kind.pop("tokens"), kind.pop("layers"), kind["experts"], 2, rng)
    return from_arrays(x, kind.pop("experts"), **kind)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, "2 layers against 3"),
        ({"experts": 7}, "6 experts, layers.0 has 7"),
        ({"tokens": 29, "lengths": [10, 19], "tokens_T": np.arange(29)}, "30 tokens against 29"),
        ({"lengths": [15, 15]}, "or other sequences"),
        ({"tokens_T": np.arange(30) + (np.arange(30) > 20)}, "differ from row 21"),
    ],
)
def test_traces_of_other_models_or_texts_are_refused(changes, message):
    with pytest.raises(BadInput, match=message):
        saturation(base(), other(**changes))


def test_another_tokenizer_is_refused():
    one, two = (Trace(replace(base().header, tokenizer=name), base().columns) for name in ("a", "b"))
    with pytest.raises(BadInput, match="different tokenizers"):
        saturation(one, two)
    saturation(one, base())
