"""Sparse, granular and BTX: what the card says must hold, on checkpoints that stock transformers loads."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from moesaic.core.errors import BadInput
from moesaic.surgery.convert import convert, plan_conversion
from moesaic.surgery.recipe import parse, plan_recipe, run_recipe

KINDS = {
    ("qwen3", 2): "qwen3_moe", ("qwen2", 2): "qwen2_moe", ("llama", 1): "mixtral", ("llama", 2): "qwen2_moe",
    ("mistral", 1): "mixtral",
}  # fmt: skip


def tensors(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(("kind", "every"), KINDS)
def test_identical_experts_whose_weights_sum_to_one_are_the_dense_model(kind, every, folder, logits, near, tmp_path):
    """Card (a), and (c): with any router; copies are the FFN's bytes, and all else is the dense model's."""
    fields = {"sliding_window": None} if kind == "mistral" else {}
    source = folder(kind, **fields)
    report = convert([source], tmp_path / "out", "sparse", {"experts": 3, "k": 2, "every": every, "seed": 4})
    assert report.stock and json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == KINDS[kind, every]
    assert near(logits(tmp_path / "out"), logits(source)) < 2e-6
    made, own = tensors(tmp_path / "out"), tensors(source)
    for name, tensor in own.items():
        layer = int(name.split(".")[2]) if ".mlp." in name else None
        if layer is None or (layer + 1) % every:
            assert torch.equal(made[name], tensor), name
    assert report.bytes_after == plan_conversion([source], "sparse", {"experts": 3, "every": every}).bytes_after


def test_one_expert_is_the_dense_model(folder, logits, near, tmp_path):
    """Card (c): N = 1, bit for bit."""
    source = folder("qwen3")
    convert([source], tmp_path / "out", "sparse", {"experts": 1, "k": 1, "every": 1})
    assert near(logits(tmp_path / "out"), logits(source)) < 1e-6


def test_weights_as_they_are_shrink_the_branch(folder, logits, near, tmp_path):
    """The trap: a raw softmax weight is below 1."""
    source = folder("qwen3")
    convert([source], tmp_path / "out", "sparse", {"experts": 8, "k": 1, "every": 1, "normalised": False})
    assert near(logits(tmp_path / "out"), logits(source)) > 0.05


@pytest.mark.parametrize(("kind", "G", "k"), [("qwen3", 4, 4), ("llama", 3, 6), ("qwen2", 2, 2)])
def test_granular_on_down_alone_is_exact_and_the_cube_root_is_not(kind, G, k, folder, logits, near, tmp_path):
    """Card (b)."""
    source = folder(kind)
    options = {"granularity": G, "experts": 3 * G, "k": k}
    convert([source], tmp_path / "out", "granular", options)
    assert near(logits(tmp_path / "out"), logits(source)) < 2e-6
    convert([source], tmp_path / "cube", "granular", {**options, "scale": "cube_root"})
    assert near(logits(tmp_path / "cube"), logits(source)) > 0.02


def test_shards_together_are_the_ffn_and_share_their_copys_row(folder, tmp_path):
    """Card (e)."""
    source = folder("qwen3")
    convert([source], tmp_path / "out", "granular", {"granularity": 4, "experts": 8, "k": 4})
    made, own = tensors(tmp_path / "out"), tensors(source)
    for layer in range(4):
        at = f"model.layers.{layer}.mlp."
        for copy in (0, 4):
            for part, axis, scale in (("gate", 0, 1), ("up", 0, 1), ("down", 1, 4)):
                shards = [made[f"{at}experts.{copy + s}.{part}_proj.weight"] for s in range(4)]
                assert torch.equal(torch.cat(shards, axis), scale * own[f"{at}{part}_proj.weight"])
        rows = made[f"{at}gate.weight"]
        assert all(torch.equal(rows[copy + s], rows[copy]) for copy in (0, 4) for s in range(4))
        assert not torch.equal(rows[0], rows[4])


def test_unnormalised_granular_is_exact_where_probabilities_are_equal(folder, logits, near, tmp_path):
    """The released factor R G^2 / k: right for a router of zeros only, which random rows of std 0.02 are near to."""
    source = folder("qwen3")
    options = {"granularity": 2, "experts": 8, "k": 2, "normalised": False}
    convert([source], tmp_path / "out", "granular", options)
    assert near(logits(tmp_path / "out"), logits(source)) < 0.2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()
    model.save_pretrained(tmp_path / "zero")
    assert near(logits(tmp_path / "zero"), logits(source)) < 2e-6  # ties: the first two experts are the shards of one copy


def test_btx_takes_ffns_apart_and_averages_the_rest(folder, tmp_path):
    sources = [folder("qwen3", seed) for seed in (0, 1, 2)]
    convert(sources, tmp_path / "out", "btx", {"k": 2})
    made, own = tensors(tmp_path / "out"), [tensors(source) for source in sources]
    for name in own[0]:
        if ".mlp." in name:
            layer, part = name.split(".")[2], name.split(".")[4]
            for e in range(3):
                assert torch.equal(made[f"model.layers.{layer}.mlp.experts.{e}.{part}.weight"], own[e][name])
        else:
            want = sum(each[name].double() for each in own) / 3
            assert torch.equal(made[name], want.float()), name


def test_btx_of_equal_models_is_that_model(folder, logits, near, tmp_path):
    """Card (d): averaging equal models is the identity, and equal experts are one."""
    source = folder("llama")
    convert([source] * 3, tmp_path / "out", "btx")
    made, own = tensors(tmp_path / "out"), tensors(source)
    assert all(torch.equal(made[name], own[name]) for name in own if ".mlp." not in name)
    assert near(logits(tmp_path / "out"), logits(source)) < 2e-6


@pytest.mark.parametrize("how", ["prompts", "embedding"])
def test_prompts_point_router_rows(how, folder, tmp_path):
    source = folder("qwen3", tokenizer=True)
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text(yaml.safe_dump([["def add(x, y):"], {"positive": ["Once upon a time"], "negative": ["integral of x"]}]))
    convert([source], tmp_path / "out", "sparse", {"experts": 2, "every": 2, "k": 1, "router": how, "prompts": str(prompts)})
    rows = tensors(tmp_path / "out")["model.layers.1.mlp.gate.weight"]
    assert torch.allclose(rows.norm(dim=1), torch.ones(2))
    if how == "embedding":
        from transformers import AutoTokenizer

        table = tensors(source)["model.embed_tokens.weight"]
        ids = AutoTokenizer.from_pretrained(source)("def add(x, y):")["input_ids"]
        want = table[ids].mean(0)
        assert torch.allclose(rows[0], want / want.norm(), atol=1e-6)
        ids = [AutoTokenizer.from_pretrained(source)(text)["input_ids"] for text in ("Once upon a time", "integral of x")]
        want = table[ids[0]].mean(0) - table[ids[1]].mean(0)
        assert torch.allclose(rows[1], want / want.norm(), atol=1e-6)
    else:
        model = AutoModelForCausalLM.from_pretrained(source)
        from transformers import AutoTokenizer

        ids, seen = AutoTokenizer.from_pretrained(source)("def add(x, y):", return_tensors="pt")["input_ids"], []
        model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            model(ids)
        want = seen[0][0].mean(0)
        assert torch.allclose(rows[0], want / want.norm(), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "models", "match"),
    [
        ("sparse", {"experts": 4, "k": 5}, 1, "k=5"),
        ("sparse", {"every": 9}, 1, "every=9"),
        ("sparse", {"router": "prompts"}, 1, "prompts are missing"),
        ("sparse", {"router": "luck"}, 1, "one of random, prompts, embedding"),
        ("sparse", {"expert": 4}, 1, "no option 'expert'"),
        ("sparse", {}, 2, "takes 1 model, given 2"),
        ("granular", {"granularity": 3, "experts": 8, "k": 3}, 1, "whole number of groups"),
        ("granular", {"granularity": 4, "experts": 8, "k": 2}, 1, "multiple of 4"),
        ("granular", {"granularity": 5, "experts": 10, "k": 5}, 1, "48 neurons has no 5 equal shards, but 4 or 6"),
        ("btx", {}, 1, "takes 2 to 1024 models, given 1"),
        ("btx", {"k": 3}, 2, "2 models make 2 experts"),
    ],
)
def test_what_cannot_apply_stops_at_planning(name, options, models, match, folder):
    with pytest.raises(BadInput, match=match):
        plan_conversion([folder("qwen3", seed) for seed in range(models)], name, options)


def test_models_that_differ_are_named(folder):
    small, other = folder("qwen3", intermediate_size=40), folder("qwen3")
    with pytest.raises(BadInput, match="differ in intermediate_size: 48 and 40"):
        plan_conversion([small, other], "btx", {})
    with pytest.raises(BadInput, match="differ in model_type"):
        plan_conversion([other, folder("llama")], "btx", {})
    first, second = folder("qwen3", tokenizer=True), folder("qwen3", tokenizer=True)
    (second / "tokenizer.json").write_text((second / "tokenizer.json").read_text() + " ")
    with pytest.raises(BadInput, match="different tokenizers"):
        plan_conversion([first, second], "btx", {})
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)).save_pretrained(other.parent / "gpt2")
    with pytest.raises(BadInput, match="gpt2: no stock MoE"):
        plan_conversion([other.parent / "gpt2"], "sparse", {})
    with pytest.raises(BadInput, match="mlp_bias"):
        plan_conversion([folder("llama", mlp_bias=True)], "sparse", {})
    with pytest.raises(BadInput, match=r"no place for tensor model\.layers\.0\.self_attn\.\w_proj\.bias"):
        plan_conversion([folder("llama", attention_bias=True)], "sparse", {"every": 1})


def test_a_broken_off_run_leaves_nothing_and_goes_on(folder, logits, near, tmp_path):
    source = folder("qwen3")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    whole = convert([source], tmp_path / "whole", "sparse", {"experts": 4, "every": 1})

    def stop(what, done, total):
        if what == "writing" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert([source], tmp_path / "out", "sparse", {"experts": 4, "every": 1}, progress=stop)
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "out.partial").glob("*.safetensors"))) == 3
    with pytest.raises(BadInput, match="broken off: pass --resume"):
        convert([source], tmp_path / "out", "sparse", {"experts": 4, "every": 1})
    with pytest.raises(BadInput, match="other steps"):
        convert([source], tmp_path / "out", "sparse", {"experts": 5, "every": 1}, resume=True)
    again = convert([source], tmp_path / "out", "sparse", {"experts": 4, "every": 1}, resume=True)
    assert again.bytes_after == whole.bytes_after and not (tmp_path / "out.partial").exists()
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    step = json.loads((tmp_path / "out" / "surgery.json").read_text())["steps"][0]
    assert step["method"] == "sparse" and step["models"] == [source.name] and step["bytes_after"] == again.bytes_after


def test_a_recipe_upcycles_and_then_prunes(folder, logits, tmp_path):
    sources = [folder("qwen3", seed) for seed in (0, 1, 2)]
    steps = parse({"steps": [{"upcycle": "btx", "models": [str(s) for s in sources[1:]]}, {"prune": "random", "keep": 2}]})
    plans = plan_recipe(sources[0], steps)
    assert [plan.experts for plan in plans] == [[3] * 4, [2] * 4] and all(plan.stock for plan in plans)
    report = run_recipe(sources[0], tmp_path / "out", steps)
    assert report["bytes_after"] == pytest.approx(plans[1].bytes_after, rel=0.01)  # router rows
    assert logits(tmp_path / "out").isfinite().all()
    held = json.loads((tmp_path / "out" / "surgery.json").read_text())["steps"]
    assert [step["family"] for step in held] == ["upcycle", "prune"]


def test_recipes_that_cannot_be(folder):
    source = folder("qwen3")
    for steps, match in (
        ([{"upcycle": "sparse"}, {"upcycle": "granular"}], r"step 2 .*make it the first step"),
        ([{"prune": "random", "keep": 2, "models": ["x"]}], "models is for a step of upcycle"),
        ([{"upcycle": "sparse", "models": "x"}], "models is a list"),
    ):
        with pytest.raises(BadInput, match=match):
            plan_recipe(source, parse({"steps": steps}))
