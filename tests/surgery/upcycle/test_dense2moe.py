"""Dense2MoE: a partition of the neurons by their Taylor scores, in a stock class with a shared expert."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic.core.documents import Document
from moesaic.core.errors import BadInput
from moesaic.surgery.conversion import Told
from moesaic.surgery.convert import build, convert, plan_conversion
from moesaic.surgery.passes import activations, taylor
from moesaic.view import View

TEXT = {"a": [Document("def add(x, y):\n    return x + y\n" * 8, "a")]}
OPTIONS = {"experts": 3, "k": 2, "shared": 0.25}


def made(folder, kind, out, **more):
    source = folder(kind, tokenizer=True)
    convert([source], out, "dense2moe", {**OPTIONS, **more}, told=Told(texts=TEXT, seq_len=32))
    return AutoModelForCausalLM.from_pretrained(source), AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(("kind", "becomes"), [("llama", "qwen2_moe"), ("qwen2", "qwen2_moe"), ("qwen3", "glm4_moe")])
def test_all_experts_on_with_weight_one_are_the_ffn(kind, becomes, folder, tmp_path):
    """Card (a)."""
    dense, moe = made(folder, kind, tmp_path / "out")
    assert moe.config.model_type == becomes
    x_TD = torch.randn(7, 32)
    for block in View(moe):
        if becomes == "qwen2_moe":
            shared = torch.sigmoid(block.parent.shared_expert_gate(x_TD)) * block.parent.shared_expert(x_TD)
        else:
            shared = block.parent.shared_experts(x_TD)
        y_TD = shared + sum(block.bank.run_one(e, x_TD)[1] for e in range(3))
        want_TD = dense.model.layers[block.layer].mlp(x_TD)
        assert torch.allclose(y_TD, want_TD, atol=1e-5), block.name


def test_with_all_experts_and_their_weights_scaled_the_model_is_the_dense_one(folder, logits, near, tmp_path):
    """Card (a) through the whole model: k = n, and a router of zeros weighs each 1/n; n times down_proj makes up for it."""
    dense, moe = made(folder, "llama", tmp_path / "out", k=3)
    for block in View(moe):
        block.router.weight.data.zero_()
        block.experts.down_proj.data *= 3
    ids = torch.randint(1, 90, (2, 9))
    assert near(moe(ids).logits, dense(ids).logits) < 1e-5


def test_neurons_are_a_partition_and_shared_ones_score_highest(folder, tmp_path):
    """Card (b), (c); the scores by autograd on the whole model."""
    made(folder, "llama", tmp_path / "out")
    method = build("dense2moe", OPTIONS)
    from moesaic.store import Reader
    from moesaic.surgery.dense import Dense

    source = next(p for p in tmp_path.iterdir() if p.name.startswith("llama"))
    with Reader("keep") as reader:
        models = [Dense(source, reader)]
        method.plan(models)
        scores_LI = method._scores(models[0], Told(texts=TEXT, seq_len=32))
    blocks = json.loads((tmp_path / "out" / "surgery.json").read_text())["steps"][0]["blocks"]
    for score_I, block in zip(scores_LI, blocks, strict=True):
        held = [block["shared_neurons"], *block["neurons"]]
        assert sorted(i for part in held for i in part) == list(range(48)) and len(held[0]) == 12
        assert score_I[held[0]].min() >= score_I[[i for part in held[1:] for i in part]].max()
        sums = torch.tensor([score_I[part].sum() for part in held[1:]])
        assert sums.max() / sums.min() < 2  # dealt evenly


def test_taylor_scores_are_sums_of_absolute_products(dense):
    model, ids = dense("llama"), torch.randint(1, 90, (2, 9))
    found = taylor(model, [ids])
    model(input_ids=ids, labels=ids).loss.backward()
    mlp = model.model.layers[2].mlp
    gate, up, down = ((p.weight.grad * p.weight).abs() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    assert torch.allclose(found[2], gate.sum(1) + up.sum(1) + down.sum(0), rtol=1e-4)
    assert torch.allclose(taylor(model, [ids[:1], ids[1:]]), found, rtol=1e-3)
    assert all(p.requires_grad for p in model.parameters())


def test_mean_activations(dense):
    model, ids = dense("qwen3"), torch.randint(1, 90, (2, 9))
    seen = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    assert torch.allclose(activations(model, [ids[:1], ids[1:]])[1], seen[0].abs().mean((0, 1)), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "domains", "match"),
    [
        ({"experts": 7}, 1, "36 neurons|not dealt evenly|48 neurons less 12"),
        ({"shared": 1.0}, 1, "shared=1.0"),
        ({"score": "luck"}, 1, "one of taylor"),
        ({}, 0, "reads text of 1 domain"),
    ],
)
def test_what_cannot_apply_stops_at_planning(options, domains, match, folder):
    with pytest.raises(BadInput, match=match):
        plan_conversion([folder("llama")], "dense2moe", {**OPTIONS, **options}, domains)
    assert plan_conversion([folder("llama")], "dense2moe", {**OPTIONS, "score": "random"}, 0).experts == [3] * 4
