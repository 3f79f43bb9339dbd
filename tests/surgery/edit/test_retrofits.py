"""Retrofits as edits: AdaMoE, MoE++, GW-MoE and EvoMoE hold what their surgery cards say."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import transformers

import moesaic
from moesaic.balancing.adamoe import AdaMoELoad
from moesaic.balancing.balancer import Scope
from moesaic.cli.main import main
from moesaic.core.context import RoutingContext
from moesaic.core.documents import Document
from moesaic.core.errors import BadInput
from moesaic.core.routing import Routing
from moesaic.experts.spawn import spawn
from moesaic.models.hosted.install import hosted_routers
from moesaic.routing.evomoe import EvoMoE as Gate
from moesaic.surgery.edit.adamoe import AdaMoE
from moesaic.surgery.edit.evomoe import EvoMoE
from moesaic.surgery.edit.gw_moe import GWMoE
from moesaic.surgery.edit.moepp import MoEPlusPlus
from moesaic.surgery.objective import Given
from moesaic.training.finetune import finetune
from moesaic.view import tiny, view

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
TEXT = [Document("the router keeps the best two of them. " * 60, "a")]


def build(name="Mixtral"):
    model = tiny.build(getattr(transformers, f"{name}ForCausalLM"))
    model.set_experts_implementation("moesaic")
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def prepared(method, model, tokenizer=None, texts=None, steps=4):
    return method.prepare(model, Given(tokenizer, texts or {}, seq_len=16, steps=steps))


@pytest.mark.parametrize("c", [1, 2])
def test_adamoe_copies_with_as_many_more_slots_are_the_model_exactly(c):
    model = build()  # top-2, divided by the sum
    want = logits(model)
    prepared(AdaMoE(nulls=8 * c, k=2 * (1 + c)), model)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    for hosted in hosted_routers(model):
        rows = hosted.router.score.weight
        assert all(torch.equal(rows[8 * (i + 1) : 8 * (i + 2)], rows[:8]) for i in range(c))


def test_adamoe_real_load_is_at_most_k_and_falls_with_a_bias_on_the_nulls():
    model = build()
    prepared(AdaMoE(nulls=8, k=4), model)
    router = hosted_routers(model)[0].router
    x_TD, loads = torch.randn(200, 32), []
    weight_RD = router.score.weight.detach().clone()
    for shift in (-5.0, 0.0, 1.0, 5.0):
        with torch.no_grad():  # a constant input column is a bias
            router.score.weight.copy_(weight_RD)
            router.score.weight[8:, 0] += shift
            x_TD[:, 0] = 1
        loads.append((router(x_TD, RoutingContext()).experts_TK >= 0).sum(1).float().mean().item())
    assert max(loads) <= 4 and loads == sorted(loads, reverse=True) and loads[0] > 3.9 > 0.1 > loads[-1]


def test_the_null_averaged_loss_knows_neither_their_order_nor_how_their_load_is_shared():
    probs_TE = torch.rand(12, 6).softmax(-1)

    def loss(selected_TK):
        return AdaMoELoad(true_experts=3).loss(
            Routing(torch.zeros(12, 6), probs_TE, selected_TK, torch.ones(12, 2), selected_TK), Scope()
        )

    one = torch.randint(0, 4, (12, 2))  # nulls 3, 4, 5: only 3 is used
    swapped = torch.where(one == 3, 5, one)
    halves = torch.where((one == 3) & (torch.arange(12)[:, None] % 2 == 0), 4, one)
    torch.testing.assert_close(loss(one), loss(swapped))
    torch.testing.assert_close(loss(one), loss(halves))
    assert not torch.allclose(loss(one), loss(torch.where(one == 3, 0, one)))


def test_an_all_null_token_gets_0_and_moves_the_router_through_the_balance_loss_alone():
    for balance, moves in ((0.0, False), (0.5, True)):
        model = build()
        prepared(AdaMoE(nulls=8, k=2, balance=balance, start="mean"), model)
        model.train()
        for hosted in hosted_routers(model):
            with torch.no_grad():
                hosted.router.score.weight[:8] = 0
                hosted.router.score.weight[8:] = 0.01
        hosted = hosted_routers(model)[0]
        x_TD = torch.rand(6, 32) + 1
        _, weights, ids = hosted(x_TD)
        assert (ids < 0).all() and not weights.any()
        routing = hosted.calls.routings[hosted.layer]
        losses = [value for key, value in routing.aux.items() if key.startswith("loss/")]
        (weights.sum() + sum(losses, torch.zeros(()))).backward()
        assert bool(hosted.router.score.weight.grad.any()) is moves


def test_moepp_starts_as_the_model_with_constants_at_the_mean_output(tiny_moe):
    model, tokenizer = moesaic.load(tiny_moe)
    want = model(IDS).logits
    outputs = {}
    handles = view(model).on_experts(lambda x, routing, y, block: outputs.setdefault(block.layer, []).append(y))
    ids = [tokenizer.eos_token_id, *tokenizer(TEXT[0].text, add_special_tokens=False)["input_ids"]]
    for at in range(0, len(ids), 16):
        with torch.no_grad():
            model(torch.tensor([ids[at : at + 16]]))
    handles.remove()
    prepared(MoEPlusPlus(), model, tokenizer, {"text": TEXT})
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)
    for block, hosted in zip(view(model), hosted_routers(model), strict=True):
        bank = block.experts
        assert not bank.mix_C2D.any() and not hosted.router.residual_weight.any()
        assert float(hosted.router.cheap_bias) == -20
        for vector_D in bank.vector_CD:
            torch.testing.assert_close(vector_D, torch.cat(outputs[block.layer]).mean(0), rtol=1e-3, atol=1e-5)


def test_moepp_cheap_experts_by_hand():
    """All tokens to a copy: g x. To a constant: g (a1 x + a2 v), a1 + a2 = 1. A zero's weight is gone before dividing."""
    model = build()
    prepared(MoEPlusPlus(constants=1, copies=1, zeros=1, bias=0.0), model)
    bank, hosted = view(model)[0].experts, hosted_routers(model)[0]
    torch.nn.init.normal_(bank.mix_C2D)
    torch.nn.init.normal_(bank.vector_CD)
    x_TD, g = torch.randn(4, 32), torch.full((4, 1), 0.7)
    torch.testing.assert_close(bank(x_TD, torch.full((4, 1), 9), g), 0.7 * x_TD)
    a_T2 = (x_TD @ bank.mix_C2D[0].T).softmax(-1)
    torch.testing.assert_close(a_T2.sum(1), torch.ones(4))
    want = 0.7 * (a_T2[:, :1] * x_TD + a_T2[:, 1:] * bank.vector_CD[0])
    torch.testing.assert_close(bank(x_TD, torch.full((4, 1), 8), g), want)
    with torch.no_grad():
        hosted.router.score.weight.zero_()
        hosted.router.score.weight[10] = 0.2  # the zero expert
        hosted.router.score.weight[2] = 0.1
    _, weights, ids = hosted(torch.ones(3, 32))
    assert ids.tolist() == [[10, 2]] * 3
    torch.testing.assert_close(weights, torch.tensor([[0.0, 1.0]] * 3))


def test_moepp_gradients_reach_the_layer_before_through_the_residual_without_the_bias():
    model = build()
    prepared(MoEPlusPlus(bias=-3.0), model)
    first, second = (hosted.router for hosted in hosted_routers(model)[:2])
    torch.nn.init.eye_(second.residual_weight)
    x_TD = torch.randn(3, 32)
    before = first(x_TD, RoutingContext(threads_state=True))
    torch.testing.assert_close(before.logits_TE - before.state, -3.0 * first.cheap_E.expand(3, -1).float())
    after = second(x_TD, RoutingContext(threads_state=True, previous=before.state))
    after.logits_TE.square().sum().backward()
    assert first.score.weight.grad.any() and second.residual_weight.grad.any()


def test_moepp_lets_cheap_experts_in_while_it_trains_and_saves_where_it_stands(tmp_path, tiny_moe):
    model, tokenizer = moesaic.load(tiny_moe)
    method = MoEPlusPlus(bias=-8.0, rate=2.0, share=0.3)
    learn = prepared(method, model, tokenizer, {"text": TEXT})
    finetune(
        model, tokenizer, {"text": TEXT}, learn, objective=method.loss, steps=12, lr=1e-3, batch_size=2, seq_len=16
    )  # fmt: skip
    model = method.finish(model)
    biases = method.facts()["cheap_bias"]
    assert all(-8 < bias < 16 for bias in biases)
    seen = []
    with view(model)[0].on_choice(lambda choice, block: seen.append((choice.ids >= 4).float().mean().item())):
        want = model(IDS).logits
    assert seen[0] > 0
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(moesaic.load(tmp_path).model(IDS).logits, want, rtol=1e-5, atol=1e-5)


def test_gw_moe_leaves_the_architecture_with_trained_rows(tiny_moe):
    model, tokenizer = moesaic.load(tiny_moe)
    kind, before = type(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    method = GWMoE(threshold=0.0, slots=4)
    learn = prepared(method, model, tokenizer)
    assert method.plan(moesaic.load(tiny_moe).model)["stock"]
    finetune(
        model, tokenizer, {"text": TEXT}, learn, objective=method.loss, steps=2, lr=0.01, batch_size=2, seq_len=16, warmup=0
    )
    model = method.finish(model)
    assert type(model) is kind and not hosted_routers(model)
    changed = {name.split(".mlp.")[-1] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}


def test_gw_moe_above_the_largest_entropy_is_ordinary_fine_tuning(tiny_moe):
    losses = {}
    for name in ("plain", "gw_moe"):
        model, tokenizer = moesaic.load(tiny_moe)
        learn, objective = [p for n, p in model.named_parameters() if ".mlp." in n], None
        if name == "gw_moe":
            method = GWMoE(threshold=math.log(4) + 0.1)
            learn, objective = prepared(method, model, tokenizer), method.loss
        losses[name] = finetune(
            model, tokenizer, {"text": TEXT}, learn, objective=objective, steps=4, lr=0.01, batch_size=2, seq_len=16, warmup=0
        )  # fmt: skip
    assert losses["plain"] == pytest.approx(losses["gw_moe"], rel=2e-3)


def test_evomoe_exact_copies_are_the_one_expert_and_masks_are_unbiased():
    model = build()
    source = copy.deepcopy(view(model)[0].bank[3])
    method = EvoMoE(source=3, zeroed=0.0, rows="random")
    prepared(method, model)
    model = method.finish(model)
    block = view(model)[0]
    x_TD = torch.randn(20, 32)
    alone = (torch.nn.functional.silu(x_TD @ source.gate.T) * (x_TD @ source.up.T)) @ source.down.T
    torch.testing.assert_close(block.parent(x_TD.unsqueeze(0)).reshape(20, -1), alone, rtol=1e-3, atol=1e-5)
    masked = build()
    prepared(EvoMoE(source=3, zeroed=0.5), masked)
    for expert in (view(masked)[0].bank[e] for e in range(8)):
        for part, weight in expert.items():
            stays = weight != 0
            assert 0.3 < stays.float().mean() < 0.7
            torch.testing.assert_close(weight[stays], 2 * source[part][stays])
    draws = []
    for seed in range(60):
        bank = view(model)[0].bank
        bank[0] = source
        spawn(bank, 0, 0.2, generator=torch.Generator().manual_seed(seed), every_matrix=True, rescale=True)
        draws.append(torch.stack([bank[e].down for e in range(8)]).mean(0))
        assert 0.1 < (bank[5].up == 0).float().mean() < 0.3 and not torch.equal(bank[5].up, bank[6].up)
    mean = torch.stack(draws).mean(0)
    # 480 copies: each entry's mean is off by 0.5 |w| / sqrt(480) at one standard deviation
    assert ((mean - source.down).abs() <= 5 * 0.5 / math.sqrt(480) * source.down.abs() + 1e-7).all()


def test_evomoe_s_gate_from_uniform_to_one_hot_and_all_run_at_threshold_0():
    x = torch.randn(50, 8)

    def gate(**options):
        router = Gate(8, 8, gumbel_weights=True, **options)
        with torch.no_grad():
            router.score.weight.copy_(torch.eye(8))
        return router(x, RoutingContext(mode="train", step=0, generator=torch.Generator().manual_seed(1)))

    hot, cold = gate(tau=1e6), gate(tau=1e-4)
    torch.testing.assert_close(hot.weights_TK, torch.full((50, 8), 1 / 8), rtol=1e-3, atol=1e-4)
    assert bool(((cold.experts_TK >= 0).sum(1) == 1).all())
    torch.testing.assert_close(cold.weights_TK.sum(1), torch.ones(50))
    uniform_TE = torch.rand(50, 8, generator=torch.Generator().manual_seed(1))
    best_T = (x - (-uniform_TE.log()).log()).argmax(-1)  # of logits and noise together
    assert torch.equal(cold.experts_TK.max(1).values, best_T) and not torch.equal(best_T, x.argmax(-1))
    assert bool((gate(tau=0.5, threshold=0.0).experts_TK >= 0).all())


def test_evomoe_trains_its_gate_and_leaves_a_stock_checkpoint_or_its_own(tmp_path, tiny_moe):
    for fixed in (True, False):
        model, tokenizer = moesaic.load(tiny_moe)
        method = EvoMoE(fixed=fixed)
        assert method.plan(model)["stock"] is fixed
        learn = prepared(method, model, tokenizer)
        finetune(
            model, tokenizer, {"text": TEXT}, learn, objective=method.loss, steps=3, lr=0.01, batch_size=2, seq_len=16, warmup=0
        )  # fmt: skip
        model = method.finish(model)
        assert bool(hosted_routers(model)) is not fixed
        model.save_pretrained(tmp_path / str(fixed))
        kind = json.loads((tmp_path / str(fixed) / "config.json").read_text())["model_type"]
        assert kind == ("qwen3_moe" if fixed else "moesaic_retrofit")
        torch.testing.assert_close(moesaic.load(tmp_path / str(fixed)).model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        (AdaMoE, {"start": "wish"}, "copies, mean"),
        (AdaMoE, {"train": "heads"}, "router"),
        (MoEPlusPlus, {"share": 1.0}, "a share"),
        (EvoMoE, {"rows": "wish"}, "zeros"),
        (EvoMoE, {"zeroed": 1.0}, "below 1"),
        (EvoMoE, {"source": 8}, "experts 0 to 7"),
        (GWMoE, {"slots": -1}, "negative"),
    ],
)
def test_what_cannot_be_is_refused(method, options, says):
    with pytest.raises(BadInput, match=says):
        method(**options).plan(build())


@pytest.mark.parametrize("method", ["adamoe", "moepp", "gw_moe", "evomoe"])
def test_the_command_runs_each(method, tmp_path, tiny_moe, tiny_data, capsys):
    with pytest.raises(SystemExit) as stop:
        main(
            ["edit", str(tiny_moe), str(tmp_path / "out"), "--method", method, "--data", str(tiny_data), "--steps", "2",
             "--seq-len", "16", "--batch-size", "2", "--context", "32", "--eval-data", str(tiny_data), "--json"]
        )  # fmt: skip
    done = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0 and done["stock"] is (method in ("gw_moe", "evomoe"))
    assert done["after"]["text"]["bits_per_byte"] > 0 and moesaic.load(tmp_path / "out").model is not None
    with pytest.raises(SystemExit) as stop:
        main(["edit", str(tmp_path / "out"), str(tmp_path / "again"), "--method", "adamoe", "--plan"])
    assert (stop.value.code == 2) is (method in ("adamoe", "moepp"))


def test_a_router_with_noise_in_training_hands_its_rows_back(tiny_moe):
    from moesaic.surgery.retrofit import retrofit

    model = moesaic.load(tiny_moe).model
    want = model(IDS).logits
    done = retrofit(model, "topk", router_options={"jitter": 0.1})
    model = done.settle()
    assert not hosted_routers(model) and torch.equal(model(IDS).logits, want)
