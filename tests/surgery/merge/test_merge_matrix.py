"""Every merger on every kind of router and layout, with every way to treat the rows; what cannot be is named in a table."""

from __future__ import annotations

import pytest
import torch

from moesaic.core import registry
from moesaic.core.errors import BadInput
from moesaic.surgery.layer import Layer
from moesaic.surgery.memory import measure, operate
from moesaic.view.block import View

NAMES = [
    "Mixtral", "DeepseekV3", "GptOss", "Olmoe", "GraniteMoe", "Phimoe", "NemotronH", "Gemma4", "Inkling", "Zaya",
    "DeepseekV4",
]  # fmt: skip
METHODS = [entry.name for entry in registry.entries("merge") if "B" not in entry.needs]
NO_COLLAPSE = {
    "DeepseekV4": "table",  # experts looked up by token id
    "Inkling": "no matrix with a row per expert",  # its router scores the shared experts too
    "Zaya": "no matrix with a row per expert",  # its router is a small network
}
BY_LOT = ("mean", "frequency")


def build(method: str, **options):
    if method == "m_smoe" and options.get("router") == "collapse":
        options["scope"] = "uniform"
    return registry.get("merge", method).build(**options)


def again(layers, model):
    """The same statistics, over another copy of the model."""
    return [Layer(l.facts, b, l._statistics, features=l._features) for l, b in zip(layers, View(model), strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_and_router_on_this_architecture(make, ids, logits, name):
    every = measure(make(name), ids, "R0,R1,A1,C")
    for method in METHODS:
        outputs = {}
        for router in ("map", "collapse", "repeat"):
            model = make(name)
            layers = again(every, model)
            if router == "collapse" and name in NO_COLLAPSE:
                with pytest.raises(BadInput, match=NO_COLLAPSE[name]):
                    operate(build(method, router=router), layers)
                continue
            changes = operate(build(method, router=router), layers)
            for change, layer in zip(changes, layers, strict=True):
                held = layer.block.num_experts
                assert sorted(e for group in change.report["groups"] for e in group) == list(range(8))
                assert all(c in g for c, g in zip(change.report["centres"], change.report["groups"], strict=True))
                assert held == {"map": len(change.report["groups"]), "collapse": 4, "repeat": 8}[router]
                if router == "collapse" and layer.facts.groups > 1:
                    assert all(len({e // 4 for e in group}) == 1 for group in change.report["groups"])
                found = change.expert_map(8)
                assert all(
                    found[a] == found[b] or router == "repeat"
                    for group in change.report["groups"]
                    for a in group
                    for b in group
                )
            outputs[router] = logits(model, ids)
            assert outputs[router].isfinite().all()
        torch.testing.assert_close(outputs["map"], outputs["repeat"])  # a shared expert is its copies


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("router", ["map", "repeat"])
def test_merging_equal_experts_changes_nothing(make, ids, logits, method, name, router):
    model = make(name)
    for block in View(model):
        block.bank[5] = block.bank[2]
        block.bank[7] = block.bank[2]
    before = logits(model, ids)
    if method in BY_LOT:  # they do not look: put the copies where the lot groups them
        method_object = build(method, keep=6, router=router)
        for number, block in enumerate(View(model)):
            groups = method_object.group(Layer(measure(model, ids, "R0")[number].facts, block), list(range(8)), 6)[0]
            for group in groups:
                for e in group[1:]:
                    block.bank[e] = block.bank[group[0]]
        before = logits(model, ids)
        operate(method_object, measure(model, ids, "R0"))
        torch.testing.assert_close(logits(model, ids), before)
        return
    layers = measure(model, ids, "R0,A1")
    options = {"similarity": "output", "scope": "uniform"} if method == "m_smoe" else {}
    if method == "uncurl":  # what it sees are logits: equal rows are equal columns
        for block in View(model):
            for parameter in block.router.parameters():
                parameter.data[5], parameter.data[7] = parameter.data[2].clone(), parameter.data[2].clone()
        before = logits(model, ids)
        layers = measure(model, ids, "R0,A1")
    changes = operate(build(method, keep=6, router=router, **options), layers)
    together = [sum(len({2, 5, 7} & set(group)) > 1 for group in change.report["groups"]) for change in changes]
    if method == "m_smoe":  # its centres are the most used, copies or not
        return
    assert all(change.report["groups"].count([2, 5, 7]) == 1 for change in changes), together
    torch.testing.assert_close(logits(model, ids), before)


def test_what_cannot_be_is_said(make):
    for options, why in (
        ({"router": "blend"}, "router 'blend'"),
        ({"align": "eye"}, "align 'eye'"),
        ({"weights": "x"}, "weights"),
    ):
        with pytest.raises(BadInput, match=why):
            build("hc_smoe", **options)
    with pytest.raises(BadInput, match="use uniform"):
        registry.get("merge", "m_smoe").build(router="collapse")
    layer = measure(make("Mixtral"), [torch.arange(8)[None] + 8], "R0")[0]
    with pytest.raises(BadInput, match="no all_output_sum"):
        build("hc_smoe").change(layer, 4)
    with pytest.raises(BadInput, match="domain 'law'"):
        build("uncurl", domain="law").change(layer, 4)
    from moesaic.surgery.planning import build as planned

    assert planned("merge", "m_smoe", {"align": "activation", "similarity": "output"})[0].needs == {"R0", "A1", "C"}
    assert planned("merge", "uncurl", {"domain": "law"})[0].needs == {"R0", "D"}
    assert planned("merge", "hc_smoe", {"feature": "routed_output"})[0].needs == {"R0", "A1", "R1"}
    facts = [layer.facts]
    assert [build("hc_smoe", router=r).plan(facts) for r in ("map", "collapse", "repeat")] == [[4], [4], [8]]
    assert [build("hc_smoe", router=r).stock for r in ("map", "collapse", "repeat")] == [False, True, True]
