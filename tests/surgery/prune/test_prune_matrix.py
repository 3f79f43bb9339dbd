"""Every pruner on every kind of router and layout: what it keeps. The tables at the top name what a method cannot serve, and
why; keeping all and the order of experts and neurons: tests/surgery/test_exactness.py."""

from __future__ import annotations

import pytest
import torch

from moesaic.core import registry
from moesaic.core.errors import BadInput
from moesaic.surgery.memory import measure, operate
from moesaic.surgery.shapes import facts_of
from moesaic.view.block import View

NAMES = {
    "Mixtral": "softmax over the chosen",
    "Qwen3Moe": "softmax, not renormalised",
    "DeepseekV3": "sigmoid, correction bias, groups, shared expert",
    "GptOss": "biases, transposed, interleaved, own gate",
    "Olmoe": "softmax, not renormalised",
    "GraniteMoe": "top-k, then softmax",
    "Phimoe": "sparse mixer",
    "NemotronH": "no gate, correction bias",
    "Gemma4": "the router stands in the decoder layer, a scale per expert",
    "Inkling": "its router scores the shared experts too",
    "Zaya": "its router is a small network with a class of its own",
    "DeepseekV4": "experts looked up by token id",
}
METHODS = [entry.name for entry in registry.entries("prune")]
CANNOT = {
    **{(method, "DeepseekV4"): "table" for method in METHODS if method != "layer_drop"},
    ("router_norm", "Inkling"): "no matrix with a row per expert",
    ("router_norm", "Zaya"): "no matrix with a row per expert",
    ("naee", "DeepseekV4"): "cannot be rebuilt",
    ("moe_i2", "DeepseekV4"): "cannot be rebuilt",
    ("naee", "Zaya"): "cannot be rebuilt",  # its router also reads the router before it
    ("moe_i2", "Zaya"): "cannot be rebuilt",
}
SMALL = {"naee": {"tokens": 16}, "moe_i2": {"tokens": 16, "population": 70}, "dern": {"alpha": 0.1}}
DERN = {"Inkling", "Zaya"}
"""Where rows cannot be added: `rows=False` works."""


def build(method: str, keep, name: str = ""):
    entry = registry.get("prune", method)
    options = dict(SMALL.get(method, {}))
    if method == "dern" and name in DERN:
        options["rows"] = False
    return entry.build(**options, **({"keep": keep} if "keep" in entry.parameters else {"drop": 0 if keep == 1.0 else 1}))


@pytest.mark.parametrize("name", NAMES)
def test_every_method_on_this_architecture(make, ids, logits, name):
    measured = make(name)
    every = measure(measured, ids, "R0,R1,C,B")
    for method in METHODS:
        model = make(name)
        layers = [type(l)(l.facts, b, l._statistics, features=l._features) for l, b in zip(every, View(model), strict=True)]
        if (method, name) in CANNOT:
            with pytest.raises(BadInput, match=CANNOT[method, name]):
                operate(build(method, 0.75, name), layers)
            continue
        changes = operate(build(method, 0.75, name), layers)
        if method not in ("layer_drop", "moe_i2"):
            assert all(len(change.keep) == 6 for change in changes), method
        for layer, change in zip(every, changes, strict=True):
            halves = [sum(e // 4 == half for e in change.keep) for half in (0, 1)]
            assert layer.facts.groups == 1 or halves[0] == halves[1], method
            assert list(change.keep) == sorted(change.keep)
        assert logits(model, ids).isfinite().all(), method


def test_what_cannot_apply_is_said_at_planning(make):
    facts = facts_of(View(make("DeepseekV3")))
    for keep, why in ((0.25, "at least 4"), (5, "do not divide"), (9, "already pruned"), (1.5, "share above 0")):
        with pytest.raises(BadInput, match=why):
            registry.get("prune", "reap").build(keep=keep).plan(facts)
    with pytest.raises(BadInput, match="scope 'everywhere'"):
        registry.get("prune", "ean").build(scope="everywhere")
    with pytest.raises(BadInput, match="calibration has no output_square_sum"):
        operate(registry.get("prune", "output_variance").build(), measure(make("Mixtral"), [torch.arange(8)[None] + 8], "R0"))
