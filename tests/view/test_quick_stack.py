"""A decoding step as one pass: the same bits as its parts one by one, and own forwards wherever it is no such step."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    DynamicCache,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import moesaic
from moesaic.kernels.few_rows import available
from moesaic.view import load
from moesaic.view.quantize import quantize_model
from moesaic.view.quick import quicken
from moesaic.view.quick_attention import one_more

pytestmark = pytest.mark.skipif(not available(), reason="Numba is not installed")

SHAPE = {
    "vocab_size": 96, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 512, "num_experts": 6, "num_experts_per_tok": 3, "max_position_embeddings": 512,
}  # fmt: skip


def made(kind="qwen3", **changes):
    torch.manual_seed(0)
    if kind == "olmoe":
        config = OlmoeConfig(**SHAPE | changes)
        model = OlmoeForCausalLM(config)
    elif kind == "qwen2":
        config = Qwen2MoeConfig(**SHAPE, moe_intermediate_size=512, shared_expert_intermediate_size=64, **changes)
        model = Qwen2MoeForCausalLM(config)
    else:
        config = Qwen3MoeConfig(**SHAPE | {"head_dim": 64, "moe_intermediate_size": 512, "norm_topk_prob": True} | changes)
        model = Qwen3MoeForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data += 0.2 * torch.randn_like(weight)  # norms of ones hide a norm that is left out
    model = model.bfloat16().eval()
    model.set_experts_implementation("moesaic")
    return model


def steps(model, ids, cache=None, prompt=5, **options):
    """Logits of a prompt's last token, then of tokens one by one."""
    cache, out = DynamicCache() if cache is None else cache, []
    with torch.inference_mode():
        out.append(model(ids[:, :prompt], past_key_values=cache, use_cache=True, **options).logits[:, -1])
        for i in range(prompt, ids.shape[1]):
            out.append(model(ids[:, i : i + 1], past_key_values=cache, use_cache=True, **options).logits[:, -1])
    return torch.stack(out), cache


def without_stack(model):
    """The same modules; only the step over all layers is taken away."""
    inner = model.model
    assert inner.quick_plan is not None
    inner.__class__ = type(inner).quick_own
    return model


def close(a, b):
    """In the median over positions: where two experts score alike, another order of summing may choose the other."""
    a, b = (rows.float().flatten(0, -2) for rows in (a, b))
    return ((a - b).norm(dim=1) / b.norm(dim=1)).median() <= 0.04  # something wrong gives 0.5


IDS = (torch.arange(90) * 37 % 96)[None]


@pytest.mark.parametrize("recipe", [None, "int8", "int4:linear=4", "mixed:high=8,low=2,share=0.5,linear=8"])
@pytest.mark.parametrize(("kind", "norm"), [("qwen3", True), ("qwen3", False), ("olmoe", True), ("olmoe", False)])
def test_the_bits_are_those_of_its_parts(kind, norm, recipe):
    model = made(kind, norm_topk_prob=norm)
    if recipe is not None:
        quantize_model(model, recipe, [torch.arange(6.0)] * 3)
    plain = copy.deepcopy(model)
    found = quicken(model)
    assert found["stack"] == 1 and found["step"] == 3 and found["router"] == 3
    parts = copy.deepcopy(model)
    quicken(parts)
    without_stack(parts)
    got, cache = steps(model, IDS)
    want, other = steps(parts, IDS)
    assert torch.equal(got, want)
    for a, b in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
    assert close(got, steps(plain, IDS)[0])


def test_the_bundled_model_takes_it():
    model = load("bundled").model
    assert quicken(model)["stack"] == (model.model.layers[0].mlp.experts.down_proj[0].nbytes >= 1 << 18)


def test_shared_experts_keep_their_own_way():
    model = made("qwen2")
    plain = copy.deepcopy(model)
    found = quicken(model)
    assert found["stack"] == 0 and found["router"] == 3
    assert close(steps(model, IDS)[0], steps(plain, IDS)[0])


def test_the_cache_can_be_cropped_copied_and_left():
    model = made()
    plain = copy.deepcopy(model)
    quicken(model)
    _, cache = steps(model, IDS[:, :20])
    twin = copy.deepcopy(cache)
    again = steps(model, IDS[:, 20:30], cache, prompt=1)[0]
    assert torch.equal(steps(model, IDS[:, 20:30], twin, prompt=1)[0], again)
    cache.crop(-10)
    assert torch.equal(steps(model, IDS[:, 20:30], cache, prompt=1)[0], again)
    cache.crop(-10)
    other = steps(plain, IDS[:, 20:30], cache, prompt=1)[0]  # a model without quick steps goes on with the same cache
    assert close(other, again)
    assert cache.get_seq_length() == 30


def calls(model, monkeypatch):
    seen = []
    plan = type(model.model.quick_plan)
    own = plan.output
    monkeypatch.setattr(plan, "output", lambda self, *a: seen.append(1) or own(self, *a))
    return seen


def test_a_step_is_taken_only_where_it_is_one(monkeypatch):
    model = made()
    plain = copy.deepcopy(model)
    quicken(model)
    seen = calls(model, monkeypatch)
    steps(model, IDS[:, :8])
    assert len(seen) == 3
    ones = torch.ones(1, 6, dtype=torch.long)
    cache = steps(model, IDS[:, :5])[1]
    with torch.inference_mode():
        model(IDS[:, 5:6], past_key_values=cache, attention_mask=ones)
    assert len(seen) == 4
    for why, change in {
        "padding": {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])},
        "hidden states": {"output_hidden_states": True},
        "router logits": {"output_router_logits": True},
    }.items():
        caches = [steps(m, IDS[:, :5])[1] for m in (model, plain)]
        seen.clear()
        with torch.inference_mode():
            a, b = (m(IDS[:, 5:6], past_key_values=c, **change) for m, c in zip((model, plain), caches, strict=True))
        assert not seen, why
        assert close(a.logits, b.logits), why
        assert [*a.keys()] == [*b.keys()], why
    two = IDS.expand(2, -1)[:, :12]
    assert close(steps(model, two)[0], steps(plain, two)[0])
    with torch.no_grad():
        kept = model(IDS[:, :6], use_cache=False).logits
    assert close(kept[:, -1], steps(plain, IDS[:, :6])[0][-1]) and not seen
    model.train()
    steps(model, IDS[:, :7])
    assert not seen


def test_hooks_are_called():
    model = made()
    quicken(model)
    want = steps(model, IDS[:, :9])[0]
    rows = []
    with moesaic.view(model).on_route(lambda routing, block: rows.append(routing.tokens)):
        got = steps(model, IDS[:, :9])[0]
    assert sum(rows) == 3 * 9
    assert torch.equal(got, want)


def test_policies_steer_single_tokens():
    model = made()
    plain = copy.deepcopy(model)
    quicken(model)
    for policy in ({"k": 5}, {"k": 1}, {"without": [0, 3]}, {"bias": torch.tensor([0.0, 0.3, 0.0, 0.0, 0.0, -0.3])}):
        seen = []
        for one in (model, plain):
            view, ids = moesaic.view(one), []
            with view.policy(**policy), view.on_route(lambda routing, block, ids=ids: ids.append(routing.experts_TK)):
                steps(one, IDS[:, :7])
            seen.append(torch.cat([x.sort(1).values for x in ids]))
        assert seen[0].shape == seen[1].shape
        assert (seen[0] == seen[1]).float().mean() > 0.9, policy


def negate(module):
    module.weight = torch.nn.Parameter(-module.weight)


def test_replaced_weights_count():
    model = made()
    quicken(model)
    steps(model, IDS[:, :8])
    for change in (
        lambda m: negate(m.model.layers[1].mlp.gate),
        lambda m: negate(m.model.layers[2].self_attn.q_proj),
        lambda m: setattr(m.model.layers[0], "mlp", copy.deepcopy(m.model.layers[2].mlp)),
        lambda m: quantize_model(m, "int8:linear=8"),
    ):
        change(model)
        fresh = copy.deepcopy(model)
        quicken(fresh)
        assert torch.equal(steps(model, IDS[:, :8])[0], steps(fresh, IDS[:, :8])[0])
    assert model.model.quick_plan.step.suits


def test_layers_whose_caches_have_other_room():
    model = made()
    quicken(model)
    _, cache = steps(model, IDS[:, :20])
    layer = cache.layers[1]
    layer.keys, layer.values = layer.keys.clone(), layer.values.clone()  # this one grows again, and from another length
    twin = copy.deepcopy(cache)
    got = steps(model, IDS[:, 20:60], cache, prompt=1)[0]
    assert torch.equal(got, steps(without_stack(model), IDS[:, 20:60], twin, prompt=1)[0])
    assert len({one_more(held)[0].shape[2] for held in cache.layers}) == 2


def test_generate_says_the_same():
    model = made()
    parts = without_stack(_quick(copy.deepcopy(model)))
    quicken(model)
    options = {"max_new_tokens": 80, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS[:, :4], **options), parts.generate(IDS[:, :4], **options))


def _quick(model):
    quicken(model)
    return model
