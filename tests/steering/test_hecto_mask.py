"""Hecto's masks: forcing is running the expert alone, off leaves the rest, and the report by class."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.layers.hecto import Hecto
from moesaic.steering.hecto_mask import HectoMask, by_class, masking


@pytest.fixture
def layer():
    return Hecto(8, 2, outputs=3, width=6, project=10).eval()


def test_forcing_is_the_expert_alone(layer):
    x = torch.randn(5, 7, 8)
    ctx = RoutingContext(sequence_ids=torch.arange(5).repeat_interleave(7))
    length = torch.full((5,), 7)
    for expert in (0, 1):
        with masking(layer, expert, "force"):
            y, routing = layer.pooled(x, ctx)
        torch.testing.assert_close(y, layer.experts[expert](layer.project(x), length))
        assert (routing.experts_TK == expert).all()
        with masking(layer, 1 - expert, "off"):
            torch.testing.assert_close(layer.pooled(x, ctx)[0], y)
    plain = layer.pooled(x, ctx)[0]
    with HectoMaskBound(layer, 0).around():
        layer.pooled(x, ctx)
    assert torch.equal(layer.pooled(x, ctx)[0], plain), "nothing stays behind"


def HectoMaskBound(layer, expert):
    steer = HectoMask(expert)
    steer.bind(layer, None)
    return steer.start([])


def test_report_by_class(layer):
    """The GRU is made to answer class 1 and the FFN class 2, whatever comes: each class is its expert's alone."""
    for expert, answer in zip(layer.experts, (2, 1), strict=True):
        nn.init.zeros_(expert.last.weight)
        expert.last.bias.data = torch.nn.functional.one_hot(torch.tensor(answer), 3).float()
    x = torch.randn(64, 3, 8)
    ctx = RoutingContext(sequence_ids=torch.arange(64).repeat_interleave(3))
    labels = layer.pooled(x, ctx)[0].argmax(-1)
    assert set(labels.tolist()) == {1, 2}
    found = by_class(layer, lambda: layer.pooled(x, ctx)[0].argmax(-1), labels)
    assert found == {"all": {1: 1.0, 2: 1.0}, "without 0": {1: 1.0, 2: 0.0}, "without 1": {1: 0.0, 2: 1.0}}


def test_bad_input_is_named(layer):
    for options, message in (
        ({"expert": 2}, "the layer has 2"),
        ({"expert": -1}, "expert's number"),
        ({"expert": 0, "do": "x"}, "off or"),
    ):
        with pytest.raises(BadInput, match=message):
            HectoMask(**options).bind(layer, None)
    with pytest.raises(BadInput, match="no Hecto layer"):
        HectoMask(0).bind(nn.Linear(2, 2), None)
