"""A recipe's errors name the field; its learning rate is checked by value."""

from __future__ import annotations

import math

import pytest
import yaml

from moesaic.core.errors import BadInput
from moesaic.training.config import TrainConfig, learning_rate

GOOD = {"data": "d", "out": "o", "model": {"model_type": "qwen3_moe"}, "steps": 1000, "warmup": 100, "lr": 0.01}


def write(tmp_path, **changes):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": -1}, "lr: "),
        ({"lrr": 1}, "lrr: no such field; did you mean lr"),
        ({"steps": "many"}, "steps: "),
        ({"warmup": 1000}, "warmup: 1000 must be less than steps, 1000"),
        ({"schedule": "linear"}, "schedule: "),
        ({"dtype": "int8"}, "dtype: "),
        ({"balance": {"switch": "much"}}, "balance.switch: "),
        ({"betas": [0.9]}, "betas.1: "),
    ],
)
def test_a_wrong_field_is_named(tmp_path, changes, words):
    with pytest.raises(BadInput, match=words) as caught:
        TrainConfig.read(write(tmp_path, **changes))
    assert "recipe.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [", "not YAML"), ("- 1", "a mapping of fields"), (None, "cannot read"), ("\xff", "lone|UTF-8|mapping")],
)
def test_a_file_that_is_no_recipe(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput, match=words):
        TrainConfig.read(path)


def test_set_changes_fields_and_fields_of_fields(tmp_path):
    sets = ["lr=1e-3", "model.num_experts=8", "balance.z=0.5", "schedule=wsd", "valid=null", "model.norm=true"]
    config = TrainConfig.read(write(tmp_path), sets)
    assert config.lr == 1e-3
    assert config.model == {"model_type": "qwen3_moe", "num_experts": 8, "norm": True}
    assert config.balance == {"z": 0.5}
    assert (config.schedule, config.valid) == ("wsd", None)
    for wrong in ("lr", "=3", "lr.x=3", "x=[1"):
        with pytest.raises(BadInput, match="--set"):
            TrainConfig.read(write(tmp_path), [wrong])


def test_cosine_by_value():
    config = TrainConfig(**GOOD, min_lr_ratio=0.1)
    assert learning_rate(config, 0) == pytest.approx(0.01 / 100)
    assert learning_rate(config, 49) == pytest.approx(0.005)
    assert learning_rate(config, 99) == pytest.approx(0.01)
    assert learning_rate(config, 100) == pytest.approx(0.01)
    assert learning_rate(config, 550) == pytest.approx(0.01 * (0.1 + 0.9 * 0.5))
    assert learning_rate(config, 325) == pytest.approx(0.01 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert learning_rate(config, 1000) == pytest.approx(0.001)


def test_wsd_by_value():
    config = TrainConfig(**GOOD, schedule="wsd", decay=0.2, min_lr_ratio=0.0)
    assert learning_rate(config, 50) == pytest.approx(0.0051)
    assert {learning_rate(config, step) for step in (100, 400, 799)} == {0.01}
    assert learning_rate(config, 900) == pytest.approx(0.005)
    assert learning_rate(config, 1000) == pytest.approx(0.0)
    assert all(learning_rate(config, s) >= learning_rate(config, s + 1) for s in range(800, 1000))
