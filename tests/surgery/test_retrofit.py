"""Routers put into trained models: what is kept at step 0, what is trained, what is saved, and what is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers

import moesaic
from moesaic.core.errors import BadInput, MoesaicError
from moesaic.models.hosted.cheap import cheap_class
from moesaic.models.hosted.install import hosted_routers
from moesaic.surgery.retrofit import plan_retrofit, retrofit
from moesaic.training.finetune import finetune
from moesaic.view import tiny, view

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


def build(name="Qwen3Moe", implementation="moesaic"):
    torch.manual_seed(0)
    model = tiny.build(getattr(transformers, f"{name}ForCausalLM"))
    model.set_experts_implementation(implementation)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", ["Qwen3Moe", "Olmoe", "Mixtral"])
@pytest.mark.parametrize(
    ("router", "options"),
    [("topk", {}), ("topk", {"jitter": 0.1}), ("gw_moe", {}), ("adamoe", {"nulls": 0})],
)
def test_step_0_keeps_the_function_where_the_card_says_so(name, router, options):
    if router == "adamoe" and name != "Mixtral":
        pytest.skip("AdaMoE divides by the sum of the chosen, these two do not")
    model = build(name)
    before = logits(model)
    retrofit(model, router, router_options=options)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_zero_computation_experts_at_the_mean_of_the_rows_leave_confident_tokens_alone():
    """MoE++ with a gating residual of 0: new rows score the mean of the others, so a token's best choices stay true ones."""
    model = build("Mixtral")
    for block in view(model):
        block.router.weight.data *= 30  # confident
    before = logits(model)
    done = retrofit(model, "moepp")
    assert done.plan.rows == 8 + 3
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_null_rows_start_at_the_mean_and_a_token_of_nulls_gets_nothing():
    model = build()
    rows = [block.router.weight.detach().clone() for block in view(model)]
    retrofit(model, "adamoe", router_options={"k": 3, "nulls": 4})
    for hosted, weight_ED in zip(hosted_routers(model), rows, strict=True):
        score = hosted.router.score.weight
        torch.testing.assert_close(score[:8], weight_ED)
        torch.testing.assert_close(score[8:], weight_ED.mean(0).expand(4, -1))
        x_TD = torch.randn(5, weight_ED.shape[1])
        with torch.no_grad():
            score.zero_()
            score[8:] = x_TD[0]
    block = view(model)[0]
    out = block.parent(x_TD[:1].unsqueeze(0))
    assert out.shape == (1, 1, x_TD.shape[1]) and not out.any()


def test_groups_and_top_p_do_what_they_say_inside_the_model():
    model = build()
    retrofit(model, "moge", router_options={"groups": 2, "per_group": 1})
    seen = []
    with view(model)[0].on_choice(lambda choice, block: seen.append(choice.ids)):
        logits(model)
    assert all(bool(((ids // 4).sort(1).values == torch.tensor([0, 1])).all()) for ids in seen) and seen
    model = build()
    retrofit(model, "top_p", router_options={"p": 1.0})
    routing = view(model)[0].route(torch.randn(4, 32))
    assert (routing.experts_TK >= 0).all() and routing.experts_TK.shape == (4, 8)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "moesaic"])
@pytest.mark.parametrize("router", ["adamoe", "moepp", "top_p"])
def test_every_experts_implementation_runs_empty_slots_and_cheap_experts(router, implementation):
    """Twin: our kernels, which skip what is empty."""
    model = build("Mixtral")
    retrofit(model, router)
    for hosted in hosted_routers(model):
        torch.nn.init.normal_(hosted.router.score.weight)
    want = logits(model)
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)


def test_cheap_experts_equal_their_definition():
    model = build()
    bank = view(model)[0].experts
    own = type(bank)
    plain = copy.deepcopy(bank)
    bank.__class__ = cheap_class(own)
    bank.add_cheap(32, 2, 1, torch.float32, "cpu")
    torch.nn.init.normal_(bank.vector_CD)
    x_TD = torch.randn(6, 32)
    ids_TK = torch.tensor([[0, 8], [9, 10], [11, 3], [-1, 8], [11, 10], [7, -1]])
    weights_TK = torch.rand(6, 2)
    want = []
    for t in range(6):
        y = torch.zeros(32)
        for e, w in zip(ids_TK[t].tolist(), weights_TK[t], strict=True):
            if 0 <= e < 8:
                y = y + plain(x_TD[t : t + 1], torch.tensor([[e]]), w.view(1, 1))[0]
            elif e in (8, 9):
                a1, a2 = (bank.mix_C2D[e - 8] @ x_TD[t]).softmax(0)
                y = y + w * (a1 * x_TD[t] + a2 * bank.vector_CD[e - 8])
            elif e == 10:
                y = y + w * x_TD[t]
        want.append(y)
    torch.testing.assert_close(bank(x_TD, ids_TK, weights_TK), torch.stack(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ["adamoe", "moepp", "top_p", "moge", "hash", "smoe_dropout", "topk"])
def test_saved_models_load_after_import_moesaic(router, tmp_path):
    model = build("Olmoe")
    balance = {"bias": 0.01} if router == "topk" else {}
    done = retrofit(model, router, balance=balance, layers=[1, 2])
    assert not done.plan.stock
    model.train()
    model(IDS, labels=IDS).loss.backward()
    model.after_step()
    model.eval()
    want = logits(model)
    done.settle().save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moesaic")
    torch.testing.assert_close(logits(again), want, rtol=1e-5, atol=1e-5)
    assert len(hosted_routers(again)) == 2 and again.config.base_model_type == "olmoe"
    loaded = moesaic.load(tmp_path).model
    torch.testing.assert_close(logits(loaded), want, rtol=1e-5, atol=1e-5)
    generated = again.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, pad_token_id=0)
    whole = again(generated).logits[:, 6:-1].argmax(-1)
    assert torch.equal(generated[:, 7:], whole), "decoding with a cache is the whole sequence"


def test_gw_moe_leaves_a_stock_checkpoint_that_stock_transformers_loads(tmp_path):
    model = build()
    done = retrofit(model, "gw_moe", router_options={"threshold": 0.0, "slots": 100})
    assert done.plan.stock
    model.train()
    model(IDS, labels=IDS).loss.backward()
    touched = {e for block in view(model) for e in range(8) if block.experts.down_proj.grad[e].any()}
    assert touched == set(range(8)), "at threshold 0 every expert learns"
    with torch.no_grad():
        for hosted in hosted_routers(model):
            hosted.router.score.weight.add_(0.01 * torch.randn_like(hosted.router.score.weight))
    model.eval()
    want = logits(model)
    settled = done.settle()
    torch.testing.assert_close(logits(settled), want, rtol=1e-5, atol=1e-6)
    settled.save_pretrained(tmp_path)
    torch.save(want, tmp_path / "want.pt")
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, experts_implementation='eager')\n"
        "assert not [name for name in sys.modules if name.startswith('moesaic')]\n"
        f"want = torch.load({str(tmp_path / 'want.pt')!r})\n"
        f"torch.testing.assert_close(model(torch.tensor({IDS.tolist()})).logits, want, rtol=1e-4, atol=1e-5)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_balance_losses_join_the_loss_and_bias_controllers_move():
    model = build()
    retrofit(model, "adamoe", router_options={"nulls": 8}, balance={"adamoe": 0.5})
    model.train()
    out = model(IDS, labels=IDS)
    losses = model.balance_losses()
    assert list(losses) == ["adamoe"] and losses["adamoe"] > 0
    plain = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(out.loss, plain + losses["adamoe"])
    losses["adamoe"].backward()
    assert all(hosted.router.score.weight.grad.any() for hosted in hosted_routers(model))
    model.eval()
    assert not model.balance_losses() or model(IDS, labels=IDS).loss < out.loss
    model = build()
    retrofit(model, "topk", balance={"bias": 0.1}, layers=[2])
    model.train()
    model(IDS, labels=IDS)
    model.after_step()
    (hosted,) = hosted_routers(model)
    assert hosted.router.bias_E.any()


def test_state_of_one_layer_reaches_the_next_and_padding_is_known():
    model = build()
    retrofit(model, "moepp")
    routers = hosted_routers(model)
    with torch.no_grad():
        for hosted in routers:
            hosted.router.residual_weight.copy_(torch.eye(len(hosted.router.residual_weight)))
    logits(model)
    routings = routers[0].calls.routings
    assert sorted(routings) == [hosted.layer for hosted in routers]
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), IDS], 1)
    mask = (torch.arange(9) >= 2).long().expand(2, 9)
    model(padded, attention_mask=mask)
    assert (routers[0].calls.routings[0].experts_TK.view(2, 9, -1)[:, :2] == -1).all()
    with pytest.raises(BadInput, match="state from layer to layer"):
        model.gradient_checkpointing_enable()


def test_views_and_copies_of_a_retrofitted_model():
    model = build()
    retrofit(model, "adamoe", router_options={"nulls": 4, "k": 4})
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    assert hosted_routers(twin)[0].calls is not hosted_routers(model)[0].calls
    blocks = view(model)
    with blocks.on_route(lambda routing, block: None):
        logits(model)
    assert blocks[0].num_experts == 8 and blocks[0].top_k == 4
    with blocks.policy(fn=lambda routing, block: routing):
        logits(model)
    with pytest.raises(BadInput, match="fn="), blocks.policy(without=[3]):
        logits(model)


@pytest.mark.parametrize(
    ("router", "how", "says"),
    [
        ("expert_choice", {}, "later tokens"),
        ("attention_aware", {}, "attention"),
        ("m3vit", {}, "task_ids"),
        ("autonomy_of_experts", {}, "bank"),
        ("product_key", {}, "bank|divide|square"),
        ("rmoe", {}, "shares one module"),
        ("chunk", {}, "cache"),
        ("smear", {}, "bank adapter"),
        ("adamoe", {"router_options": {"k": 99}}, "k=99"),
        ("adamoe", {"router_options": {"colour": 1}}, "its options are"),
        ("nosuch", {}, "no routing method"),
        ("topk", {"bank": "monet"}, "zero_computation"),
        ("topk", {"bank_options": {"zeros": 1}}, "gated_mlp"),
        ("topk", {"layers": [77]}, "no MoE block in layer 77"),
        ("topk", {"layers": []}, "at least one"),
        ("topk", {"balance": {"nosuch": 1}}, "no balancing method"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_is_as_it_was(router, how, says):
    model = build()
    before, kind = logits(model), type(model)
    with pytest.raises(MoesaicError, match=says):
        retrofit(model, router, **how)
    assert type(model) is kind and not hosted_routers(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["DeepseekV3", "Phimoe", "GptOss"])
def test_models_that_route_otherwise_are_refused(name):
    with pytest.raises(BadInput, match="softmax top-k"):
        plan_retrofit(build(name), "adamoe")


def test_a_retrofitted_model_is_not_retrofitted_again():
    model = build()
    retrofit(model, "adamoe")
    with pytest.raises(BadInput, match="already"):
        plan_retrofit(model, "top_p")


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"the cat {i} sat on the mat. " * 40, "domain": "a"}) + "\n" for i in range(6)))
    return file


def test_finetuning_trains_what_it_is_told_and_keeps_dtypes(text):
    model, tokenizer = moesaic.load("bundled")
    retrofit(model, "adamoe", router_options={"k": 3, "nulls": 8}, balance={"adamoe": 0.01}, layers=[0])
    (hosted,) = hosted_routers(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = finetune(model, tokenizer, text, hosted.router.parameters(), steps=3, lr=0.05, batch_size=2, seq_len=32, warmup=0)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"model.layers.0.mlp.gate.router.score.weight"} and len(losses) == 3
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in model.parameters()) and not model.training
    with pytest.raises(BadInput, match="diverged"):
        finetune(model, tokenizer, text, hosted.router.parameters(), steps=2, lr=float("inf"), batch_size=1, seq_len=32)


def test_the_command_plans_writes_whole_and_refuses(tmp_path, text, capsys):
    from moesaic.cli.main import main

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["retrofit", "bundled", *map(str, arguments)])
        return stop.value.code, capsys.readouterr()

    out = tmp_path / "out"
    code, said = call(out, "--router", "adamoe", "--router-options", "k=3,nulls=4", "--plan", "--json")
    planned = json.loads(said.out)
    assert code == 0 and not planned["stock"] and "import moesaic" in planned["loads_with"] and not out.exists()
    code, said = call(
        out, "--router", "adamoe", "--router-options", "k=3,nulls=4", "--balance", "adamoe=0.01", "--data", text,
        "--steps", 2, "--batch-size", 1, "--seq-len", 32, "--eval-data", text, "--max-bytes", 300, "--context", 64, "--json",
    )  # fmt: skip
    done = json.loads(said.out)
    assert code == 0 and done["before"]["experts_per_token"] == 2 and done["untrained"]["experts_per_token"] > 2
    assert {"bits_per_byte", "experts_per_token"} <= done["after"].keys() and len(done["steps"]) == 2
    loaded = moesaic.load(out)
    assert loaded.tokenizer is not None and len(hosted_routers(loaded.model)) == 6
    for arguments, says in [
        ((out,), "not empty"),
        ((tmp_path / "no" / "where",), "no folder"),
        ((tmp_path / "x", "--steps", 3), "go together"),
        ((tmp_path / "x", "--router-options", "k"), "name=value"),
        ((tmp_path / "x", "--train", "heads"), "router+experts"),
        ((tmp_path / "x", "--router", "scot"), "later tokens"),
        ((tmp_path / "x", "--data", tmp_path / "none", "--steps", 1), "none"),
        ((), "OUT is missing"),
    ]:
        code, said = call(*arguments)
        assert code == 2 and says in said.err, said.err
        assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".*partial"))
