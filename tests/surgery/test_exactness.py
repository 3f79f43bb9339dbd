"""What every layer-wise method owes, whatever it does (surgery-and-steering.md, section C): nothing asked changes no bit; the
order of experts and of neurons does not matter; only experts and their router rows change; the report tells it all.

Every registered method is in every test. The tables name what does not hold of a method, and why.
"""

from __future__ import annotations

import json

import pytest
import torch

from moesaic.core import registry
from moesaic.surgery.align import permuted
from moesaic.surgery.layer import Layer
from moesaic.surgery.memory import measure, operate
from moesaic.surgery.planning import LAYERWISE
from moesaic.view.block import View

ALL = [(family, entry.name) for family in LAYERWISE for entry in registry.entries(family)]

NOTHING = {"prune": {"keep": 1.0}, "merge": {"keep": 1.0}, "compress": {"keep": 1.0}, "quantize": {"bits": 16}}
SOME = {"prune": {"keep": 0.75}, "merge": {"keep": 0.5}, "compress": {"keep": 0.6}, "quantize": {"bits": 5, "group": 32}}
QUICK = {
    ("prune", "naee"): {"tokens": 32}, ("prune", "moe_i2"): {"tokens": 32, "population": 70}, ("prune", "dern"): {"alpha": 0.1},
    ("compress", "moe_i2"): {"tokens": 64}, ("compress", "maestro"): {"steps": 1}, ("quantize", "gptq"): {"least": 4},
}  # fmt: skip
OWN = {("prune", "layer_drop"): ({"drop": 0}, {"drop": 1})}
"""Of nothing and of some, where a method has no share to keep."""

BY_LOT = {("prune", "random"), ("merge", "mean"), ("merge", "frequency")}
"""They draw by number, whoever bears it: another order of the experts is another draw."""

SEE_NEURONS = {
    ("prune", "similarity"): "its cosine is of flattened weights, in the order in which they lie (as published)",
    ("quantize", "gptq"): "it rounds the columns of down in their order; gate and up, whose rows are neurons, do not see it",
    ("quantize", "pmq"): "the same, by its rounding; what it allocates does not see it",
    ("compress", "d2_moe"): "its base is the mean of experts whose neurons are not aligned (as published)",
}
UNSEEN = {("compress", "maestro"): {"steps": 0}}
"""Options under which a method does not see them: inputs in another order have another Cholesky factor, so Maestro's steps
start from a rotation of the same factors, and Adam sees rotations. What it starts from, and shares out ranks by, does not."""
TOLERANCE = {"quantize": 1e-2, "compress": 2e-3}
"""Of logits, where statistics that differ in their last bits are inverted or decide how something is rounded; else 2e-4."""

SCORES_ELSEWHERE = {
    ("prune", "naee"): "error", ("prune", "moe_i2"): "candidates", ("prune", "layer_drop"): "cosine",
    ("compress", "low_rank"): "first_error", ("compress", "d2_moe"): "first_error", ("compress", "maestro"): "first_ranks",
    ("compress", "neurons"): "score_lost", ("compress", "mc_smoe"): "first_rows",
    **{("quantize", name): "error" for name in ("rtn", "gptq", "awq", "hqq")},
}  # fmt: skip
"""Methods that do not decide by a number per expert, and what of their report they decide by, or leave behind."""

EVERYTHING = "R0,R1,R2,A1,B,C"


def build(key, which: str = "some", **more):
    own = OWN[key] if key in OWN else (NOTHING[key[0]], SOME[key[0]] | QUICK.get(key, {}))
    return registry.get(*key).build(**{**own[which == "some"], **more})


@pytest.fixture(scope="module")
def many():
    return [torch.randint(8, 80, (8, 17), generator=torch.Generator().manual_seed(4))]


@pytest.fixture(scope="module")
def held():
    return {}


@pytest.fixture
def measured(make, many, held, shuffle):
    """measured(name, other) -> a fresh model and its first two layers with all statistics; with `other` "experts" or "neurons"
    these stand in another order, which is returned as well."""

    def run(name, other=""):
        model, orders = make(name), []
        if other == "experts":
            orders = shuffle(model)
        if other == "neurons":
            generator = torch.Generator().manual_seed(9)
            for block in View(model):
                orders.append([torch.randperm(16, generator=generator) for _ in range(block.num_experts)])
                for e, order in enumerate(orders[-1]):
                    block.bank[e] = permuted(block.bank[e], order)
        if (name, other) not in held:
            held[name, other] = measure(model, many, EVERYTHING)
        layers = [
            Layer(each.facts, block, each._statistics, features=each._features)
            for each, block in zip(held[name, other], View(model), strict=True)
        ]
        return model, layers[:2], orders[:2]

    return run


def near(one, other, key):
    return float((one - other).abs().max()) <= TOLERANCE.get(key[0], 2e-4) * float(other.abs().max())


@pytest.mark.parametrize("key", ALL, ids="-".join)
@pytest.mark.parametrize("name", ["Mixtral", "DeepseekV3", "GptOss"])
def test_nothing_asked_is_bit_identical(measured, name, key):
    routers = ("map", "collapse", "repeat") if key[0] == "merge" else (None,)
    for router in routers:
        options = {} if router is None else {"router": router}
        if key == ("merge", "m_smoe") and router == "collapse":
            options["scope"] = "uniform"
        model, layers, _ = measured(name)
        before = {tensor: value.clone() for tensor, value in model.state_dict().items()}
        operate(build(key, "nothing", **options), layers)
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[tensor], before[tensor]) for tensor in before)


def edge_ties(change, groups):
    """Whether a score of those that stay is one of those that go, in some group of a router."""
    if change.scores is None:
        return False
    size, kept = len(change.scores) // groups, set(change.keep)
    parts = [range(g * size, (g + 1) * size) for g in range(groups)]
    sides = [[[float(change.scores[e]) for e in part if (e in kept) is stays] for stays in (True, False)] for part in parts]
    return any(stay and go and min(stay) <= max(go) for stay, go in sides)


@pytest.mark.parametrize("key", ALL, ids="-".join)
@pytest.mark.parametrize("name", ["Olmoe", "DeepseekV3"])
def test_a_permutation_of_the_experts_commutes(measured, many, logits, name, key):
    (first, layers, _), (second, others, orders) = measured(name), measured(name, "experts")
    changes = operate(build(key), layers), operate(build(key), others)
    if key in BY_LOT:  # the same numbers, which are other experts
        told = [[(list(change.keep), change.report.get("groups")) for change in each] for each in changes]
        assert told[0] == told[1]
        return
    tied = False
    for one, other, order, layer in zip(*changes, orders, layers, strict=True):
        if one.scores is not None:
            torch.testing.assert_close(other.scores.double(), one.scores.double()[order], rtol=1e-4, atol=1e-7)
        if key[0] == "prune" and edge_ties(one, layer.facts.groups):  # ties go to the lower number
            tied = True
            assert len(one.keep) == len(other.keep)
            continue
        assert sorted(order[e] for e in other.keep) == sorted(one.keep) or key == ("prune", "layer_drop")
        if "groups" in one.report:
            assert sorted(sorted(order[e] for e in group) for group in other.report["groups"]) == sorted(one.report["groups"])
        if "bits" in one.report:
            assert [one.report["bits"][e] for e in order] == other.report["bits"]
    assert tied or near(logits(second, many), logits(first, many), key)


@pytest.mark.parametrize("key", ALL, ids="-".join)
def test_a_permutation_of_neurons_leaves_the_function(measured, many, logits, key):
    (first, layers, _), (second, others, orders) = measured("Mixtral"), measured("Mixtral", "neurons")
    assert near(logits(second, many), logits(first, many), ("", ""))
    more = (
        {"align": "weight"} if key[0] == "merge" else UNSEEN.get(key, {})
    )  # the mean of what lies in another order is another
    if key == ("prune", "similarity"):
        assert not torch.allclose(build(key).score(layers[0]), build(key).score(others[0]))
        return
    changes = operate(build(key, **more), layers), operate(build(key, **more), others)
    for one, other in zip(*changes, strict=True):
        assert list(one.keep) == list(other.keep) and one.report.get("groups") == other.report.get("groups")
        assert one.report.get("bits") == other.report.get("bits")
    if key == ("compress", "d2_moe"):
        assert not near(logits(second, many), logits(first, many), key)
        return
    if key in SEE_NEURONS:
        for one, other, each in zip(layers, others, orders, strict=True):
            for e, order in enumerate(each):
                rounded, own = permuted(one.block.bank[e], order), other.block.bank[e]
                assert all(torch.equal(rounded[part], own[part]) for part in ("gate", "up"))
        return
    assert near(logits(second, many), logits(first, many), key)


@pytest.mark.parametrize("key", ALL, ids="-".join)
def test_what_changes_and_what_the_report_says(measured, key):
    """Shared experts, attention, norms and embeddings keep every bit; so do routers, unless rows go or merge. The report has
    the map of experts, sizes and scores."""
    model, layers, _ = measured("DeepseekV3")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    experts = tuple(f"{block.name}.experts." for block in View(model))
    routers = tuple(f"{block.name}.gate." for block in View(model))
    assert any("shared_experts" in name for name in before)
    changes = operate(build(key), layers)
    after = model.state_dict()
    kept = [name for name in before if not name.startswith(experts)]
    if key[0] == "prune" or (key[0] == "merge" and layers[0].block.row_map is None):  # collapsed, as UNCURL is by default
        kept = [name for name in kept if not name.startswith(routers)]
    assert all(torch.equal(after[name], before[name]) for name in kept)
    for change, layer in zip(changes, layers, strict=True):
        found = change.expert_map(8)
        assert len(found) == 8 and set(found) - {-1} == set(range(layer.block.num_experts))
        if key[0] == "prune":
            assert [found[e] for e in change.keep] == list(range(len(change.keep))) and found.count(-1) == 8 - len(change.keep)
        if key[0] in ("compress", "quantize"):
            assert change.report.get("share", 0) <= 0.6 + 1e-6 or key[1] == "mc_smoe"  # whose share is of the whole model
            assert found == list(range(8)) and {"share", "inner_after", "packed_bytes"} & set(change.report)
        if key in SCORES_ELSEWHERE:
            assert change.report[SCORES_ELSEWHERE[key]] is not None
        else:
            assert change.scores.shape == (8,) and change.scores.isfinite().all()
        json.dumps(change.report)
