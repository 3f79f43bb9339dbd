"""A MoE back to a dense model."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic.core.errors import BadInput
from moesaic.surgery.convert import convert, plan_conversion
from moesaic.surgery.recipe import parse, plan_recipe, run_recipe
from moesaic.view import View


@pytest.mark.parametrize("how", ["average", "one", "concat"])
@pytest.mark.parametrize(("kind", "every"), [("qwen3", 2), ("qwen2", 2), ("llama", 1), ("llama", 2)])
def test_an_upcycled_model_comes_back(how, kind, every, folder, logits, near, tmp_path):
    """Equal experts are one: the dense model that they came from, bit for bit but for concat's sums."""
    source = folder(kind)
    convert([source], tmp_path / "moe", "sparse", {"experts": 4, "every": every})
    plan = plan_conversion([tmp_path / "moe"], "dense", {"how": how})
    report = convert([tmp_path / "moe"], tmp_path / "out", "dense", {"how": how})
    assert plan.bytes_after == report.bytes_after and plan.stock
    assert near(logits(tmp_path / "out"), logits(source)) < (1e-6 if how == "concat" or kind != "qwen3" else 1e-9)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == ("mistral" if (kind, every) == ("llama", 1) else kind)
    assert (config["intermediate_size"] > 100) == (how == "concat")


def test_concat_of_all_is_the_sum_at_fixed_weights(make, tmp_path):
    moe = make("Qwen3Moe")
    moe.save_pretrained(tmp_path / "moe")
    convert([tmp_path / "moe"], tmp_path / "out", "dense", {"how": "concat"})
    dense, x_TD = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.randn(5, moe.config.hidden_size)
    for block in View(moe):
        E = block.num_experts
        want_TD = sum(block.bank.run_one(e, x_TD)[1] for e in range(E)) / E
        assert torch.allclose(dense.model.layers[block.layer].mlp(x_TD), want_TD, atol=1e-4)


def test_a_given_expert_and_kept_ones(make, tmp_path):
    moe = make("Mixtral")
    moe.save_pretrained(tmp_path / "moe")
    convert([tmp_path / "moe"], tmp_path / "one", "dense", {"how": "one", "expert": 2})
    dense, block = AutoModelForCausalLM.from_pretrained(tmp_path / "one"), View(moe)[0]
    assert torch.equal(dense.model.layers[0].mlp.down_proj.weight, block.bank.peek(2)["down"])
    convert([tmp_path / "moe"], tmp_path / "two", "dense", {"how": "concat", "keep": 2})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "two").config.intermediate_size == 2 * dense.config.intermediate_size


def test_use_from_a_text_weighs_experts(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little fox. " * 40)
    steps = parse({"data": str(text), "max_bytes": 2000, "steps": [{"prune": "frequency", "keep": 8}, {"upcycle": "dense"}]})
    plans = plan_recipe("bundled", steps)
    assert plans[1].facts == [] and plans[1].stock
    report = run_recipe("bundled", tmp_path / "out", steps)
    assert report["bytes_after"] == plans[1].bytes_after
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "qwen3" and model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    shares = json.loads((tmp_path / "out" / "surgery.json").read_text())["steps"][1]["blocks"][0]["shares"]
    assert sum(shares) == pytest.approx(1) and max(shares) > 1.5 / 8


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"how": "best"}, "one of average"),
        ({"how": "one", "expert": 99}, "there are 16 experts"),
        ({"expert": 1}, "choose how=one"),
        ({"how": "concat", "keep": 17}, "there are 16 experts"),
        ({"keep": 2}, "how=concat"),
    ],
)
def test_what_cannot_apply_stops_at_planning(options, match):
    with pytest.raises(BadInput, match=match):
        plan_conversion(["bundled"], "dense", options)


def test_a_moe_without_a_dense_counterpart_is_named(make, tmp_path):
    make("Olmoe").save_pretrained(tmp_path / "moe")
    with pytest.raises(BadInput, match="olmoe: no stock dense model"):
        plan_conversion([tmp_path / "moe"], "dense", {})
    with pytest.raises(BadInput, match="no experts after upcycle dense"):
        plan_recipe("bundled", parse({"steps": [{"upcycle": "dense"}, {"prune": "random", "keep": 2}]}))
