"""Margin: a loop over tokens, closed forms, and traces that lack the columns."""

from __future__ import annotations

import numpy as np
import pytest
from awkward_traces import sets

from moesaic.core.errors import BadInput
from moesaic.trace.file import from_arrays
from moesaic.trace.statistics.margin import PARTS, margin
from moesaic.trace.statistics.result import NotRecorded


def entropy(p):
    p = np.array([x for x in p if x > 0])
    return -(p * np.log(p)).sum()


def test_it_equals_a_loop_over_tokens():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(90, 2, 9)).astype(np.float16)
    experts = [9, 5]
    x = np.stack([np.argsort(-logits[:, l, :e].astype(float), -1)[:, :3] for l, e in enumerate(experts)], 1)
    weights = rng.random((90, 2, 3)).astype(np.float16)
    x[:20, 0, 2], x[20:25, 1] = -1, -1
    trace = from_arrays(x, experts, lengths=[30, 60], weights_TLK=weights, logits_TLE=logits)
    found = margin(trace, bins=10)
    for l, e in enumerate(experts):
        want = [[], [], [], []]
        for t in range(90):
            held = [k for k in range(3) if x[t, l, k] >= 0]
            w = sorted((float(weights[t, l, k]) for k in held), reverse=True)
            if len(held) >= 2:
                want[0].append(w[0] - w[1])
                want[1].append(entropy(np.array(w) / sum(w)) / np.log(len(w)))
            if held:
                z = logits[t, l, :e].astype(float)
                chosen = [int(x[t, l, k]) for k in held]
                want[2].append(min(z[chosen]) - max(np.delete(z, chosen)))
                want[3].append(entropy(np.exp(z) / np.exp(z).sum()) / np.log(e))
        np.testing.assert_allclose(found.value_LQ[l], [np.mean(part) for part in want], rtol=1e-4)
        assert found.margins_LB[l].sum() == len(want[0])
        np.testing.assert_array_equal(found.margins_LB[l], np.histogram(want[0], found.edges_B1)[0])
    assert (found.low_LQ < found.value_LQ).all() and (found.value_LQ < found.high_LQ).all()


def test_certain_and_undecided_routers():
    x = sets(50, 1, 8, 2, np.random.default_rng(0))
    sure = np.full((50, 1, 8), -60.0)
    np.put_along_axis(sure, x[..., :1], 60.0, -1)
    np.put_along_axis(sure, x[..., 1:], 0.0, -1)
    found = margin(from_arrays(x, 8, weights_TLK=np.tile([1.0, 0.0], (50, 1, 1)), logits_TLE=sure))
    np.testing.assert_allclose(found.value_LQ[0], [1, 0, 60, 0], atol=1e-6)
    found = margin(from_arrays(x, 8, weights_TLK=np.full((50, 1, 2), 0.5), logits_TLE=np.zeros((50, 1, 8))))
    np.testing.assert_allclose(found.value_LQ[0], [0, 1, 0, 1], atol=1e-6)


def test_a_choice_against_the_logits_has_a_negative_boundary():
    found = margin(from_arrays([[[0]], [[0]]], 3, logits_TLE=[[[0.0, 2.0, 1.0]]] * 2))
    assert found.value_LQ[0, 2] == -2 and np.isnan(found.value_LQ[0, 0])


def test_what_is_not_recorded_is_said():
    x = np.zeros((4, 1, 1), int)
    with pytest.raises(NotRecorded, match="neither weights nor logits"):
        margin(from_arrays(x, 2))
    found = margin(from_arrays(x, 2, weights_TLK=np.ones((4, 1, 1))))
    assert np.isnan(found.value_LQ).all() and dict.fromkeys(PARTS) == found.summary()
    with pytest.raises(BadInput, match="bins"):
        margin(from_arrays(x, 2, weights_TLK=np.ones((4, 1, 1))), bins=0)


def test_every_awkward_trace_has_margins_of_its_own_rows(awkward):
    rng = np.random.default_rng(0)
    shape = awkward.experts_TLK.shape
    columns = dict(awkward.columns) | {"weights": rng.random(shape).astype(np.float16)}
    columns["logits"] = rng.normal(size=(*shape[:2], awkward.num_experts)).astype(np.float16)
    found = margin(type(awkward)(awkward.header, columns), resamples=10)
    for l, kind in enumerate(awkward.layers):
        routed = (awkward.experts_TLK[:, l] != awkward.empty).any()
        assert np.isfinite(found.value_LQ[l, 3]) == bool(routed and kind.experts > 1)
        assert not found.value_LQ[l, 3] < 0 and not found.value_LQ[l, 3] > 1
