"""Groups of layers go on from each other's hidden states, and a model that cannot be taken in parts is noticed."""

from __future__ import annotations

import pytest
import torch

import moesaic
from moesaic.core.documents import Document
from moesaic.trace import corpus
from moesaic.trace.calibration import calibrate, relay
from moesaic.trace.calibration.collect import Collector
from moesaic.view import coverage, tiny

TEXT = [Document("The router scores every expert for every token, keeps the best two, and weighs them. " * 3, "prose")]


def counted(model, index):
    """How often a decoder layer really runs."""
    layer, calls = model.model.layers[index], []
    attention = layer.self_attn
    attention.register_forward_hook(lambda *_: calls.append(1))
    return calls


def same(one, other):
    for layer in range(len(one)):
        mine, theirs = one.layer(layer).sums, other.layer(layer).sums
        for name in mine:
            assert torch.allclose(mine[name], theirs[name], rtol=1e-5, atol=1e-6), name


def test_earlier_layers_run_once(tiny_moe, tmp_path):
    loaded = moesaic.load(tiny_moe, dtype="float32")
    calls = counted(loaded.model, 0)
    whole = calibrate(loaded, TEXT, tmp_path / "whole", context=16, batch_size=2)
    once = len(calls)
    calls.clear()
    parts = calibrate(loaded, TEXT, tmp_path / "parts", context=16, batch_size=2, layers_at_once=1)
    assert len(calls) == once + 1  # one batch more, to see that relaying is right
    same(whole, parts)
    assert not (tmp_path / "parts" / "relay").exists()
    assert "forward" not in loaded.model.model.layers[0].__dict__


def test_a_model_whose_layers_share_more_is_taken_whole(tiny_moe, tmp_path):
    """Layer 1 here adds something that layer 0 left behind: the relayed batch differs, so every pass is a whole one."""
    loaded = moesaic.load(tiny_moe, dtype="float32")
    first, second = loaded.model.model.layers
    left = {}

    def leave(module, args, output):
        left["x"] = output[0] if isinstance(output, tuple) else output

    def add(module, args, kwargs):
        extra = left.pop("x", None)
        return None if extra is None else ((args[0] + extra.roll(1, 0), *args[1:]), kwargs)

    first.mlp.register_forward_hook(leave)
    second.mlp.register_forward_pre_hook(add, with_kwargs=True)
    calls = counted(loaded.model, 0)
    whole = calibrate(loaded, TEXT, tmp_path / "whole", context=16, batch_size=2)
    once = len(calls)
    calls.clear()
    parts = calibrate(loaded, TEXT, tmp_path / "parts", context=16, batch_size=2, layers_at_once=1)
    assert len(calls) == 2 * once + 1
    same(whole, parts)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "mixtral", "gemma4"])
def test_relayed_layers_see_what_they_saw(name, tmp_path):
    """Masks, positions and layer types differ from layer to layer; the model itself still makes them."""
    if name not in {a.name for a in tiny.architectures()}:
        pytest.skip(f"transformers here has no {name} behind the experts decorator")
    architecture = next(a for a in tiny.architectures() if a.name == name)
    case = coverage.open_case(tiny.model_classes(architecture)[0], architecture)
    blocks = case.view
    ids = torch.randint(1, 100, (2, 12))

    def collect(layers, passes):
        with Collector(blocks, ("R0", "R1"), layers) as collector:
            passes()
        return {layer: found[""] for layer, found in collector.sums.items()}

    def run():
        try:
            corpus.forward(case.model, ids, torch.ones_like(ids))
        except relay.Stop:
            return

    want = collect(range(len(blocks)), run)
    groups = [[i] for i in range(len(blocks))]
    carrier = relay.Relay(blocks, groups, tmp_path / "relay")
    carrier.batch(1)
    for number, layers in enumerate(groups):
        carrier.check(number, run)
        with carrier.group(number):
            found = collect(layers, run)
        for layer in layers:
            for key, tensor in found[layer].items():
                assert torch.allclose(tensor, want[layer][key], rtol=1e-4, atol=1e-6), (layer, key)
    assert not carrier.broken
