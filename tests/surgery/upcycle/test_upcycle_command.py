"""`moesaic upcycle`, and recipes that begin with dense models."""

import json

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moesaic.cli.surgical import trainer
from moesaic.cli.upcycle import app, split
from moesaic.core.errors import BadInput
from moesaic.surgery.recipe import parse, plan_recipe, run_recipe


def ran(*words):
    return CliRunner().invoke(app, [*map(str, words), "--json"], catch_exceptions=False)


def test_the_command_plans_and_makes_a_stock_moe(folder, tmp_path):
    sources, out = [folder("llama", seed) for seed in (0, 1)], tmp_path / "out"
    planned = json.loads(ran(*sources, "--method", "btx", "--plan").stdout)
    assert planned["out"] is None and planned["plan"][0]["experts"] == [2] * 4 and planned["plan"][0]["stock"]
    assert json.loads(ran(*sources, out, "--method", "btx", "--plan").stdout)["out"] == str(out) and not out.exists()
    report = json.loads(ran(*sources, out, "--method", "btx", "--k", "1").stdout)
    assert report["stock"] and report["bytes_after"] == planned["plan"][0]["bytes_after"]
    assert AutoModelForCausalLM.from_pretrained(out).config.num_experts_per_tok == 1
    assert not list(tmp_path.glob("out.*"))


def test_out_is_the_last_word(folder):
    source = folder("llama")
    assert split([str(source), "o"], False) == ([str(source)], split(["x", "o"], False)[1])
    with pytest.raises(BadInput, match="name the model"):
        split(["o"], False)


def test_a_recipe_distils_with_its_teacher_and_reads_answers_as_the_method_does(folder, tmp_path):
    """A dense student in a recipe, whose answers are a file of prompts and responses, not a text."""
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"prompt": f"{n} plus one is ", "response": str(n + 1)}) + "\n" for n in range(20)))
    student = folder("qwen3", tokenizer=True)
    step = {
        "distill": "llava_mod", "experts": 2, "every": 2, "teacher": "bundled", "texts": {"answers": str(answers)},
        "training": {"steps": 2, "batch_size": 1, "seq_len": 32},
    }  # fmt: skip
    steps = parse({"steps": [step]})
    assert plan_recipe(student, steps, trainer)[0].stock
    run_recipe(student, tmp_path / "out", steps, trainer=trainer)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_experts == 2
    with pytest.raises(BadInput, match="teacher is missing"):
        plan_recipe(student, parse({"steps": [{**step, "teacher": None}]}), trainer)
