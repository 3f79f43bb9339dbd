"""Card: layers-and-balancing.md, "Switch / GShard", item 2: the policies of the second expert."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.routing.gshard import GShard

TRAIN, EVAL = RoutingContext(mode="train"), RoutingContext()


def route(second, ctx=TRAIN, tokens=4000):
    router = GShard(8, 8, second=second, threshold=0.2)
    router.score.weight.data.copy_(torch.eye(8))
    torch.manual_seed(1)
    return router(3 * torch.randn(tokens, 8), ctx)


def test_all_none_and_threshold():
    both, one, sure = route("all"), route("none"), route("threshold")
    assert (both.experts_TK >= 0).all()
    assert (one.experts_TK[:, 1] == -1).all() and (one.experts_TK[:, 0] >= 0).all()
    torch.testing.assert_close(one.weights_TK[:, 0], both.weights_TK[:, 0])
    assert torch.equal(sure.experts_TK[:, 1] >= 0, both.weights_TK[:, 1] > 0.2)
    assert torch.equal(one.counts_E(), both.counts_E())


def test_random_keeps_by_weight_over_threshold():
    both, some = route("all"), route("random")
    second = both.weights_TK[:, 1]
    kept = some.experts_TK[:, 1] >= 0
    assert kept[second > 0.2].all()
    unsure = second < 0.2
    expected = (second[unsure] / 0.2).mean()
    assert abs(kept[unsure].float().mean() - expected) < 0.03


def test_evaluation_keeps_both():
    assert (route("none", EVAL).experts_TK >= 0).all()
    with pytest.raises(BadInput, match="second='some'"):
        GShard(8, 8, second="some")
