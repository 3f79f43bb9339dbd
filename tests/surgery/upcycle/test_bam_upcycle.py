"""BAM: what the card says must hold of a mix of dense models, saved, reloaded and decoded with a cache."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic  # noqa: F401 - registers the classes
from moesaic.core.errors import BadInput
from moesaic.surgery.convert import convert, plan_conversion

IDS = torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(0))


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("shared_kv", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "cohere"])
@torch.no_grad()
def test_equal_models_are_that_model_for_any_router(kind, shared_kv, folder, near, tmp_path):
    """Card (a), (d): weights sum to 1, and the mean of equal keys and values is exact; one after the other or in parallel."""
    source = folder(kind)
    options = {"renormalised": True, "shared_kv": shared_kv, "seed": 5}
    convert([source] * 3, tmp_path / "out", "bam", options)
    assert near(loaded(tmp_path / "out")(IDS).logits, loaded(source)(IDS).logits) < 2e-6


@torch.no_grad()
def test_a_raw_top_1_probability_shrinks_the_branch(folder, near, tmp_path):
    """Card (b)."""
    source = folder("qwen3")
    convert([source] * 3, tmp_path / "out", "bam")
    assert near(loaded(tmp_path / "out")(IDS).logits, loaded(source)(IDS).logits) > 0.05


@torch.no_grad()
def test_one_hot_weights_select_a_models_attention(folder, tmp_path):
    """Card (c)."""
    sources = [folder("qwen3", seed) for seed in (0, 1)]
    convert(sources, tmp_path / "out", "bam")
    mixed, second = loaded(tmp_path / "out"), loaded(sources[1])
    layer, own = mixed.model.layers[2], second.model.layers[2]
    layer.self_attn.score = _Always(torch.tensor([-1e4, 1e4]))
    x_BND = torch.randn(2, 5, 32)
    at = mixed.model.rotary_emb(x_BND, torch.arange(5)[None])
    found = layer.self_attn(x_BND, position_embeddings=at, attention_mask=None)[0]
    assert torch.allclose(found, own.self_attn(x_BND, position_embeddings=at, attention_mask=None)[0], atol=1e-5)


class _Always(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return self.logits.expand(*x.shape[:-1], len(self.logits))


@torch.no_grad()
def test_the_order_of_models_does_not_matter_to_the_mean(folder, tmp_path):
    """Card (e); experts are the models' own."""
    sources = [folder("llama", seed) for seed in (0, 1, 2)]
    convert(sources, tmp_path / "a", "bam")
    convert(sources[::-1], tmp_path / "b", "bam")
    a, b = loaded(tmp_path / "a"), loaded(tmp_path / "b")
    assert torch.equal(a.model.embed_tokens.weight, b.model.embed_tokens.weight)
    for mine, theirs in zip(a.model.layers, b.model.layers, strict=True):
        assert torch.equal(mine.input_layernorm.weight, theirs.input_layernorm.weight)
        assert torch.equal(mine.self_attn.experts[0].q_proj.weight, theirs.self_attn.experts[2].q_proj.weight)


@pytest.mark.parametrize("shared_kv", [False, True])
def test_decoding_with_a_cache_is_decoding_without(shared_kv, folder, tmp_path):
    convert([folder("qwen3", seed) for seed in (0, 1)], tmp_path / "out", "bam", {"shared_kv": shared_kv})
    model = loaded(tmp_path / "out")
    with_cache, without = (model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False))
    assert torch.equal(with_cache, without)


def test_balance_losses_join_the_models_in_training(folder, tmp_path):
    convert([folder("qwen3", seed) for seed in (0, 1)], tmp_path / "out", "bam")
    model = loaded(tmp_path / "out").train()
    loss = model(input_ids=IDS, labels=IDS).loss
    plain = torch.nn.functional.cross_entropy(model(input_ids=IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    extra = sum(model.balance_losses().values())
    assert extra > 0 and torch.allclose(loss, plain + extra, atol=1e-5)
    loss.backward()
    assert model.model.layers[0].self_attn.score.weight.grad.abs().sum() > 0


def test_plans_and_refusals(folder):
    plan = plan_conversion([folder("llama", seed) for seed in (0, 1)], "bam", {})
    assert not plan.stock and "import moesaic" in plan.reason
    with pytest.raises(BadInput, match="takes 2 to 64 models"):
        plan_conversion([folder("llama")], "bam", {})
    with pytest.raises(BadInput, match="SiLU"):
        plan_conversion([folder("llama", hidden_act="gelu")] * 2, "bam", {})
