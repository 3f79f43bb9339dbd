"""Small real experiments of the cards on the bundled model and real text: directions of effect that are robust."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from moesaic.core import registry
from moesaic.core.documents import read_documents
from moesaic.surgery.layer import Layer
from moesaic.surgery.memory import loss, measure, operate
from moesaic.view.block import View

pytestmark = [pytest.mark.slow, pytest.mark.shared]
DOMAINS = ("prose", "python", "spanish", "math")


def text(tokenizer, shared, split, rows=4, length=128):
    """Rows [4, N] of each domain."""
    found = []
    for domain in DOMAINS:
        ids: list[int] = []
        for document in itertools.islice(read_documents(shared / "data" / "corpus" / split / f"{domain}.jsonl.gz"), 40):
            ids += tokenizer(document.text)["input_ids"]
        found.append(torch.tensor(ids[: rows * length]).reshape(rows, length))
    return found


@pytest.fixture(scope="module")
def real(shared):
    import moesaic

    loaded = moesaic.load("bundled")
    model = loaded.model.float()
    model.set_experts_implementation("moesaic")
    layers = measure(model, text(loaded.tokenizer, shared, "train"), "R0,R1,A1,C")
    return model, layers, text(loaded.tokenizer, shared, "valid", rows=2)


def after(real, family, method, **options):
    model, layers, held_out = real
    other = copy.deepcopy(model)
    mine = [Layer(l.facts, b, l._statistics, features=l._features) for l, b in zip(layers, View(other), strict=True)]
    operate(registry.get(family, method).build(**options), mine)
    return loss(other, held_out)


def test_pruning_half_orders_as_published(real):
    found = {m: after(real, "prune", m, keep=0.5) for m in ("reap", "ean", "frequency")}
    found["random"] = sum(after(real, "prune", "random", keep=0.5, seed=seed) for seed in range(3)) / 3
    untouched = loss(real[0], real[2])
    assert untouched < min(found.values())
    assert max(found["reap"], found["ean"]) < found["random"]


def test_a_search_of_sets_beats_counting(real):
    found = {m: after(real, "prune", m, keep=0.5, **o) for m, o in (("naee", {"tokens": 512}), ("frequency", {}))}
    assert found["naee"] < found["frequency"]


def test_merging_wants_aligned_neurons_and_weights_by_use(real):
    how = {"keep": 0.5, "scope": "uniform"}
    aligned = after(real, "merge", "m_smoe", align="weight", **how)
    unaligned = after(real, "merge", "m_smoe", align="none", **how)
    plain = after(real, "merge", "m_smoe", align="none", weights="mean", **how)
    by_lot = after(real, "merge", "mean", keep=0.5)
    assert loss(real[0], real[2]) < aligned < unaligned < plain < by_lot
    assert after(real, "prune", "reap", keep=0.5) < aligned


def test_one_ranking_over_the_model_helps_reap(real):
    assert after(real, "prune", "reap", keep=0.5, scope="global") < after(real, "prune", "reap", keep=0.5)
