"""Tiny live models of different conventions, and ids to measure them on."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from moesaic.view import tiny
from moesaic.view.block import View


@pytest.fixture(scope="session")
def _built():
    return {}


@pytest.fixture
def make(_built):
    """make(name) -> a tiny random model (a fresh copy) of a class such as "Mixtral", in eager float32."""

    def build(name: str):
        if name not in _built:
            model_class = getattr(transformers, f"{name}ForCausalLM", None)
            if model_class is None:
                found = next(a for a in tiny.architectures() if a.name == name.lower())
                model_class = tiny.model_classes(found)[0]
            _built[name] = tiny.build(model_class)
            _built[name].set_experts_implementation("eager")
        return copy.deepcopy(_built[name])

    return build


@pytest.fixture
def ids():
    return [torch.randint(8, 80, (2, 9), generator=torch.Generator().manual_seed(3))]


@pytest.fixture
def logits():
    """logits(model, ids) without gradients."""

    def run(model, batches):
        with torch.no_grad():
            return model(input_ids=batches[0]).logits

    return run


@pytest.fixture
def shuffle():
    """shuffle(model, seed) -> permutes the experts of every block in place (router rows, vectors and experts together; within
    groups where the router has some); the order of each block: expert i is what expert order[i] was."""

    def permute(model, seed: int = 5):
        from moesaic.surgery.apply import apply
        from moesaic.surgery.layer import Change
        from moesaic.surgery.shapes import facts_of

        blocks, generator = View(model), torch.Generator().manual_seed(seed)
        orders = []
        for block, facts in zip(blocks, facts_of(blocks), strict=True):
            size = facts.experts // facts.groups
            order = [g * size + int(i) for g in range(facts.groups) for i in torch.randperm(size, generator=generator)]
            apply(block, Change(order), facts)
            orders.append(order)
        return orders

    return permute


@pytest.fixture
def on_disk(tmp_path):
    """on_disk(name, tiers) -> (class, folder of a tiny checkpoint, statistics of some ids, as a calibration)."""

    def build(name: str, tiers: str = "R0,R1,R2"):
        from moesaic.surgery.memory import measure
        from moesaic.trace.calibration.store import Calibration, CalibrationHeader
        from moesaic.trace.file import TraceLayer

        (model_class,) = tiny.model_classes(next(a for a in tiny.architectures() if a.name == name))
        tiny.build(model_class).save_pretrained(tmp_path / "in")
        model = model_class.from_pretrained(tmp_path / "in").eval()
        ids = [torch.randint(8, 80, (6, 16), generator=torch.Generator().manual_seed(3))]
        layers = measure(model, ids, tiers)

        class Held(Calibration):
            hash = "held"

            def layer(self, layer, domain=None):
                return layers[layer].statistics

            def features(self, layer):
                return tuple(side.numpy() for side in layers[layer].features())

        known = tuple(TraceLayer(*_row(TraceLayer, each.facts)) for each in layers)
        header = CalibrationHeader(known, tuple(tiers.split(",")), progress={"tokens": 96})
        return model_class, tmp_path / "in", Held(tmp_path, header)

    def _row(kind, facts):
        values = {"name": facts.name, "experts": facts.experts, "top_k": facts.top_k}
        return [values.get(field, 0) for field in kind._fields]

    return build


@pytest.fixture
def said():
    """said(model) -> what it gives for its architecture's sample inputs."""

    def run(model):
        with torch.no_grad():
            return model.eval()(**tiny.inputs(model)).to_tuple()[0]

    return run
