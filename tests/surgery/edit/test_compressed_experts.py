"""Compressed experts: what the card says must hold, saving and reloading, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from torch.nn.functional import linear, silu

import moesaic
from moesaic.cli.main import main
from moesaic.core.documents import Document
from moesaic.core.errors import BadInput
from moesaic.models.hosted.compressed import CompressedExperts as Mixed
from moesaic.models.hosted.compressed import scale
from moesaic.surgery.edit.compressed_experts import CompressedExperts
from moesaic.surgery.objective import Given
from moesaic.training.finetune import finetune
from moesaic.view import tiny, view

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


def build(name="Qwen3Moe", implementation="moesaic", k=4):
    model_class = getattr(transformers, f"{name}ForCausalLM")
    config = tiny.tiny_config(model_class.config_class)
    config.num_experts_per_tok = k
    torch.manual_seed(0)
    model = model_class(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.set_experts_implementation(implementation)
    return model


def compress(model, **options):
    method = CompressedExperts(**options)
    return method, method.prepare(model, Given(None))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", ["Qwen3Moe", "Olmoe", "Mixtral", "DeepseekV3"])
@pytest.mark.parametrize("implementation", ["moesaic", "eager"])
def test_ones_are_plain_top_main_bit_for_bit(name, implementation):
    """Twin: a policy that keeps each token's two best of four, with the weights that compressed experts give them."""
    model = build(name, implementation)
    twin = copy.deepcopy(model)
    compress(model, main=2)

    def best_two(routing, block):
        order_TK = routing.weights_TK.argsort(dim=-1, descending=True, stable=True)[:, :2]
        weights_TK = routing.weights_TK.gather(1, order_TK)
        if model.model.layers[block.layer].mlp.experts.renormalise_main:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return routing.replace(experts_TK=routing.experts_TK.gather(1, order_TK), weights_TK=weights_TK)

    with view(twin).on_route(best_two):
        want = logits(twin)
    assert torch.equal(logits(model), want)


def test_ones_are_the_model_with_a_smaller_k():
    model, twin = build(), build(k=2)
    compress(model, main=2)
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Qwen3Moe", "Olmoe"])
def test_no_auxiliary_expert_is_the_base_model(name):
    model = build(name)
    want = logits(model)
    compress(model, main=4)
    assert torch.equal(logits(model), want)


def test_shares_sum_to_1_whatever_the_auxiliary_scale():
    theta_ED = torch.randn(6, 5)
    ids_TA, weights_TA = torch.randint(0, 6, (40, 3)), torch.rand(40, 3)
    twin = (weights_TA / weights_TA.sum(1, keepdim=True)).unsqueeze(-1) * theta_ED[ids_TA]
    torch.testing.assert_close(scale(theta_ED, ids_TA, weights_TA), twin.sum(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scale(theta_ED, ids_TA, 7 * weights_TA), scale(theta_ED, ids_TA, weights_TA))
    assert torch.equal(scale(torch.ones(6, 5), ids_TA, weights_TA), torch.ones(40, 5))
    empty = scale(theta_ED, torch.full((2, 3), -1), torch.zeros(2, 3))
    assert torch.equal(empty, torch.ones(2, 5)), "no auxiliary expert: x as it is"


def test_the_gradient_reaches_theta_of_auxiliary_experts_and_the_router_through_their_shares():
    model = build("Olmoe")
    compress(model, main=2)
    block = view(model)[1]
    bank = block.experts
    with torch.no_grad():
        bank.theta_ED.add_(torch.randn_like(bank.theta_ED))
    x_TD, ids_TK = torch.randn(5, 32), torch.tensor([[0, 1, 2, 3]] * 4 + [[4, 5, 0, 1]])
    weights_TK = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 5, requires_grad=True)
    bank(x_TD, ids_TK, weights_TK).square().sum().backward()
    touched = {e for e in range(8) if bank.theta_ED.grad[e].any()}
    assert touched == {0, 1, 2, 3}, "2 and 3 of four tokens, 0 and 1 of the last; 4 to 7 are never auxiliary"
    assert weights_TK.grad[:, 2:].abs().min() > 0
    (grad_TK,) = torch.autograd.grad(scale(bank.theta_ED, ids_TK[:, 2:], weights_TK[:, 2:]).sum(), weights_TK)
    torch.testing.assert_close((grad_TK * weights_TK).sum(1), torch.zeros(5), atol=1e-5, rtol=0)  # only ratios matter


def test_shared_experts_and_the_router_see_what_enters_the_block():
    model = build("DeepseekV3")
    compress(model, main=2)
    block = view(model)[0]
    with torch.no_grad():
        block.experts.theta_ED.add_(torch.randn_like(block.experts.theta_ED))
    seen = []
    for module in (block.parent.shared_experts, block.router):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x_BND = torch.randn(1, 5, 32)
    with torch.no_grad():
        mixed = block.parent(x_BND)
        assert len(seen) == 2 and all(torch.equal(x.reshape(5, 32), x_BND[0]) for x in seen)
        block.experts.theta_ED.fill_(1)
        assert not torch.allclose(block.parent(x_BND), mixed)


@pytest.mark.parametrize("vectors", [1, 3])
def test_each_projection_has_its_vector(vectors):
    """Twin: a loop over tokens and experts."""
    model = build("Mixtral")
    compress(model, main=2, vectors=vectors)
    bank = view(model)[0].experts
    for name, p in bank.named_parameters():
        if name.startswith("theta"):
            torch.nn.init.normal_(p, mean=1.0)
    x_TD = torch.randn(6, 32)
    ids_TK = torch.stack([torch.randperm(8)[:4] for _ in range(6)])
    weights_TK = torch.rand(6, 4)
    weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
    want = torch.zeros(6, 32)
    for t in range(6):
        order = weights_TK[t].argsort(descending=True)
        main, rest = order[:2], order[2:]
        a = weights_TK[t, rest] / weights_TK[t, rest].sum()

        def mixed(theta, rest=rest, a=a, t=t):
            return (a[:, None] * theta[ids_TK[t, rest]]).sum(0)

        g = weights_TK[t, main] / weights_TK[t, main].sum()
        for e, w in zip(ids_TK[t, main].tolist(), g, strict=True):
            gate, up = bank.gate_up_proj[e].chunk(2)
            on_gate = mixed(bank.theta_ED)
            on_up = mixed(bank.theta_up_ED) if vectors == 3 else on_gate
            h = silu(linear(x_TD[t] * on_gate, gate)) * linear(x_TD[t] * on_up, up)
            want[t] += w * linear(h * mixed(bank.theta_down_EI) if vectors == 3 else h, bank.down_proj[e])
    torch.testing.assert_close(bank(x_TD, ids_TK, weights_TK), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("vectors", [1, 3])
def test_it_is_saved_reloaded_and_decodes_with_a_cache(tmp_path, vectors):
    model = build()
    compress(model, main=1, vectors=vectors)
    with torch.no_grad():
        for block in view(model):
            for name, p in block.experts.named_parameters():
                if name.startswith("theta"):
                    p.add_(0.3 * torch.randn_like(p))
    want = logits(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moesaic")
    torch.testing.assert_close(logits(again), want, rtol=1e-5, atol=1e-5)
    loaded = moesaic.load(tmp_path).model
    torch.testing.assert_close(logits(loaded), want, rtol=1e-5, atol=1e-5)
    assert isinstance(view(loaded)[0].experts, Mixed) and loaded.config.base_model_type == "qwen3_moe"
    ids = loaded.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(ids[:, 7:], loaded(ids).logits[:, 6:-1].argmax(-1))
    with pytest.raises(BadInput, match="already"):
        CompressedExperts().plan(loaded)


def test_only_what_was_named_learns_and_theta_does_not_decay(tiny_moe):
    model, tokenizer = moesaic.load(tiny_moe)
    method = CompressedExperts(main=1, train="vectors")
    learn = method.prepare(model, Given(tokenizer))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    text = [Document("the router keeps the best two. " * 40, "a")]
    finetune(model, tokenizer, text, learn, steps=2, lr=0.05, warmup=0, batch_size=2, seq_len=16)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"model.layers.{i}.mlp.experts.theta_ED" for i in range(2)}
    assert all((before[name] == 1).all() for name in changed)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"main": 9}, "runs 4"), ({"main": 0}, "runs 4"), ({"vectors": 2}, "1, or 3"), ({"train": "none"}, "one of vectors")],
)
def test_what_cannot_be_is_refused(options, says):
    with pytest.raises(BadInput, match=says):
        CompressedExperts(**options).plan(build())


def test_the_command(tmp_path, tiny_moe, tiny_data, capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["edit", str(tiny_moe), *map(str, arguments)])
        return stop.value.code, capsys.readouterr()

    out, sizes = tmp_path / "out", ("--seq-len", 16, "--batch-size", 2, "--context", 32)
    code, said = call(out, "--plan", "--json", *sizes)
    planned = json.loads(said.out)
    assert code == 0 and not planned["stock"] and planned["main"] == 1 and "import moesaic" in planned["loads_with"]
    code, said = call(out, "--data", tiny_data, "--steps", 2, "--eval-data", tiny_data, *sizes, "--json")
    done = json.loads(said.out)
    assert code == 0, said.err
    assert done["steps"][0]["steps"] == 2 and done["before"]["text"]["bits_per_byte"] > 0
    assert moesaic.load(out).tokenizer is not None
    for arguments, says in [
        ((tmp_path / "x", "--steps", 3), "go together"),
        ((tmp_path / "x", "--method", "wish"), "no edit method"),
        ((tmp_path / "x", "--options", "main=5", *sizes), "runs 2"),
        ((), "OUT is missing"),
    ]:
        code, said = call(*arguments)
        assert code == 2 and says in said.err, said.err
        assert not (tmp_path / "x").exists()
