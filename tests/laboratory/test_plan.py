"""Sweep files: grids and lists become checked recipes, and every mistake is named before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import moesaic.laboratory
from moesaic.core import registry
from moesaic.core.errors import BadInput
from moesaic.laboratory.document import claims
from moesaic.laboratory.plan import read_plan

LAB = Path(moesaic.laboratory.__file__).with_name("lab.yaml")


def test_a_grid_and_a_list_with_seeds(sweep_file):
    path = sweep_file(
        grid={"lr": [0.01, 0.02], "model.router": ["topk", "rmoe"]},
        cells=[{"name": "one", "model.k": 1, "seeds": [5, 6], "group": "mine", "match": "model.expert_width"}],
        set={"steps": 8},
    )
    plan = read_plan(path)
    assert [cell.key for cell in plan.cells] == [
        "lr=0.01-router=topk-s0", "lr=0.01-router=rmoe-s0", "lr=0.02-router=topk-s0", "lr=0.02-router=rmoe-s0",
        "one-s5", "one-s6",
    ]  # fmt: skip
    last = plan.cells[-1]
    assert (last.group, last.match, last.seed) == ("mine", "model.expert_width", 6)
    assert last.recipe["model"]["k"] == 1 and last.recipe["steps"] == 8 and last.recipe["seed"] == 6
    assert plan.base["model"]["k"] == 2, "a cell changes a copy"
    assert len({cell.fingerprint for cell in plan.cells}) == 6
    assert len({cell.tokens_key for cell in plan.cells}) == 1
    changed = read_plan(path, sets={"steps": 9})
    assert all(cell.recipe["steps"] == 9 for cell in changed.cells)
    assert plan.again([last], [7])[0].key == "one-s7"


def test_a_base_is_found_beside_the_sweep_file(sweep_file, tmp_path):
    path = sweep_file(cells=[{"name": "a"}])
    told = yaml.safe_load(path.read_text())
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(told["base"]))
    path.write_text(yaml.safe_dump({**told, "base": "base.yaml"}))
    assert read_plan(path).cells[0].recipe["steps"] == 10


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "no cells: give grid"),
        ({"cells": [{"name": "a"}, {"name": "a"}]}, "two cells are called a-s0"),
        ({"cells": [{"model.k": 1}]}, r"cells\[0\]: a name of letters"),
        ({"cells": [{"name": "a/b"}]}, "a name of letters"),
        ({"cells": [{"name": "a", "stepz": 1}]}, "cell a: stepz: no such field; did you mean steps"),
        ({"cells": [{"name": "a", "steps": -1}]}, "cell a: steps: "),
        ({"cells": [{"name": "a", "steps.x": 1}]}, "steps is not a mapping"),
        ({"cells": [{"name": "a", "seeds": 3}]}, "cell a: seeds: a list of whole numbers, not 3"),
        ({"cells": [{"name": "a"}], "base": "nowhere.yaml"}, "base: no recipe nowhere.yaml"),
        ({"cells": [{"name": "a"}], "seeds": []}, "seeds: "),
        ({"sells": [{"name": "a"}]}, "sells: "),
    ],
)
def test_mistakes_are_named(sweep_file, fields, words):
    path = sweep_file(**fields)
    with pytest.raises(BadInput, match=words):
        read_plan(path)


def test_no_yaml_is_an_error(tmp_path):
    path = tmp_path / "x.yaml"
    with pytest.raises(BadInput, match="cannot read"):
        read_plan(path)
    path.write_text("a: [")
    with pytest.raises(BadInput, match="not YAML"):
        read_plan(path)
    path.write_text("- a")
    with pytest.raises(BadInput, match="is a mapping"):
        read_plan(path)


def test_the_laboratory_has_every_router_bank_and_layer():
    """A method that is registered stands in a cell, or among what is left out, with the reason."""
    plan = read_plan(LAB)
    models = [cell.recipe["model"] for cell in plan.cells]
    for family, field in (("routing", "router"), ("experts", "bank"), ("layers", "layer")):
        used = {model.get(field) for model in models}
        missing = {entry.name for entry in registry.entries(family)} - used - plan.left_out.keys()
        assert not missing, f"{family}: give {sorted(missing)} a cell in lab.yaml, or say why not"
    for entry in registry.entries("routing"):
        if not entry.causal and entry.name not in plan.left_out:
            cells = [cell for cell in plan.cells if cell.recipe["model"].get("router") == entry.name]
            assert all(cell.recipe["model"]["causal"] is False and cell.group == "masked" for cell in cells)
    names = {cell.name for cell in plan.cells}
    for claim in claims():
        assert {claim["cell"], claim["than"]} <= names, claim
