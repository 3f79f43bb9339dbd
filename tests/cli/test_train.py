"""`moesaic train`: one command to a model, JSON at the end, and bad input in one line."""

from __future__ import annotations

import json

import pytest
import yaml


@pytest.fixture
def recipe(tiny_data, tiny_tokenizer, tmp_path):
    model = {
        "model_type": "qwen3_moe", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "moe_intermediate_size": 8, "num_experts": 4,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    fields = {"data": str(tiny_data), "out": "run", "tokenizer": str(tiny_tokenizer), "model": model, "seq_len": 16}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**fields, "batch_size": 2, "steps": 4, "warmup": 1, "save_every": 2, "threads": 1}))
    return path


def test_trains_and_the_result_runs(moesaic, recipe):
    result = moesaic("train", recipe, "--json", "--set", "steps=6", "--set", "balance.switch=0.01")
    assert result.code == 0, result.err
    done = json.loads(result.out)
    assert len(result.out.strip().splitlines()) == 1
    assert (done["steps"], done["tokens"], done["resumed_from"]) == (6, 6 * 2 * 16, None)
    assert done["loss"] > 0
    assert "step 0" in result.err
    assert json.loads(moesaic("run", done["final"], "the", "--json", "--no-page", "--threads", 1).out)["experts"] == 4
    again = json.loads(moesaic("train", recipe, "--json", "--set", "steps=6").out)
    assert again["resumed_from"].endswith("step-000006")


def test_says_in_words_where_the_model_is(moesaic, recipe):
    out = moesaic("train", recipe).out
    assert "4 steps" in out
    assert "model in run/final" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gone.yaml"], "gone.yaml: cannot read the training config (No such file or directory)"),
        (["RECIPE", "--set", "lr=fast"], "lr: "),
        (["RECIPE", "--set", "stepz=4"], "stepz: no such field; did you mean steps?"),
        (["RECIPE", "--set", "steps"], "--set steps: write key=value"),
        (["RECIPE", "--set", "model.model_type=gpt9"], "no architecture 'gpt9'"),
        (["RECIPE", "--set", "data=/nowhere"], "no such file or folder: /nowhere"),
        (["RECIPE", "--set", "balance.swich=1"], "balance.swich"),
    ],
)
def test_bad_input(moesaic, recipe, arguments, words):
    result = moesaic("train", *[recipe if a == "RECIPE" else a for a in arguments])
    assert words in result.complaint
    assert result.out == ""
