"""The reference model as a transformers model: what it gives, refuses, recomputes, and how Trainer drives it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from moesaic.core.errors import BadInput, MissingNeed
from moesaic.models.language.build import HOST
from moesaic.models.language.callback import MoesaicCallback
from moesaic.models.language.config import PER_CALL


def model_of(**fields):
    torch.manual_seed(0)
    given = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "experts": 4}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("moesaic", **{**given, **fields}))


def test_every_need_of_a_router_is_given():
    model = model_of(gives=list(PER_CALL)).eval()
    seen = []
    for block in model.model.blocks:
        block.moe.router.needs = HOST | set(PER_CALL)
        block.moe.router.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    ids = torch.randint(0, 40, (2, 5))
    model(ids, **{name: torch.tensor([3, 4]) for name in PER_CALL})
    first, second = seen
    for name in sorted((HOST | set(PER_CALL)) - {"previous"}):
        assert first.need(name) is not None, name
    assert first.need("previous") is None
    assert (first.layer, second.layer) == (0, 1)
    assert first.task_ids.tolist() == [3] * 5 + [4] * 5
    assert first.token_ids.tolist() == ids.flatten().tolist()
    assert first.positions.tolist() == [0, 1, 2, 3, 4] * 2
    assert first.sequence_ids.tolist() == [0] * 5 + [1] * 5
    assert first.generator.initial_seed() != second.generator.initial_seed()


def test_ids_per_token_carry_on_while_generating():
    model = model_of(gives=["task_ids"]).eval()
    seen = []
    model.model.blocks[0].moe.router.register_forward_pre_hook(lambda module, args: seen.append(args[1].task_ids.tolist()))
    task_ids = torch.tensor([[0, 1, 2]])
    model.generate(torch.randint(0, 40, (1, 3)), task_ids=task_ids, max_new_tokens=3, do_sample=False)
    assert seen == [[0, 1, 2], [2], [2]]
    seen.clear()
    model.generate(torch.randint(0, 40, (1, 3)), task_ids=task_ids, max_new_tokens=3, do_sample=False, use_cache=False)
    assert seen == [[0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 2, 2]]
    with pytest.raises(BadInput, match=r"task_ids is \[2\]: give one per sequence, \[1\], or one per token, \[1, 3\]"):
        model(torch.zeros(1, 3, dtype=torch.long), task_ids=torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 30}, "heads of an even width"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide"),
        ({"router": "expert_choice"}, "causal host"),
        ({"k": 9}, "k=9 experts per token, but the router has only 4"),
        ({"k": [1, 2, 1]}, r"one entry per MoE layer, of which there are 2: \[0, 1\]"),
        ({"router": "top_p", "k": 2}, "router top_p has no k; its options are p, renormalise"),
        ({"router_options": {"kk": 2}}, "layer 0: .*kk"),
        ({"dense_layers": [5]}, "dense_layers: no layer 5"),
        ({"moe_last": 3}, "moe_last=3 must be between 0 and num_hidden_layers=2"),
        ({"dense_layers": [0], "per_layer": {"0": {"k": 1}}}, r"per_layer: '0' is no MoE layer: those are \[1\]"),
        ({"experts": 0, "balance": {"switch": 0.1}}, "balance: switch asked for, but no layer of this model has experts"),
        ({"gives": ["colour"]}, "gives: colour: a caller can give task_ids"),
        ({"causal": False}, "name the token that hides them, mask_token_id"),
        ({"balance": {"swich": 0.1}}, "no balancing method 'swich'"),
        ({"balance": {"switch": {"coefficent": 0.1}}}, "balance.switch: .*coefficent"),
        ({"layer": "deepseekmoe", "router": "adamoe"}, "layer deepseekmoe brings its own"),
        ({"layer": "momentum", "layer_options": {"mo": 1}}, "layer_options.mo: layer momentum has no such option: .*gamma"),
    ],
)
def test_refusals_name_the_field(fields, words):
    with pytest.raises(BadInput, match=words):
        model_of(**fields)


def test_a_need_that_nobody_promised_is_refused_with_its_name():
    with pytest.raises(MissingNeed, match="activations"):
        model_of(router="autonomy_of_experts", bank="gated_mlp")
    model = model_of(router="hash").eval()
    with pytest.raises(MissingNeed, match="token_ids"):
        model(inputs_embeds=torch.randn(1, 3, 16))


def test_which_layers_route_and_with_what():
    model = model_of(num_hidden_layers=5, moe_every=2, k=[1, 3], per_layer={"3": {"convention": "sigmoid"}})
    assert [block.moe is not None for block in model.model.blocks] == [False, True, False, True, False]
    routers = [block.moe.router for block in model.model.blocks if block.moe is not None]
    assert [(router.k, router.convention) for router in routers] == [(1, "renormalised"), (3, "sigmoid")]
    last = model_of(num_hidden_layers=4, moe_last=2, dense_layers=[3])
    assert [block.moe is not None for block in last.model.blocks] == [False, False, True, False]


def test_shared_experts_and_the_dense_branch_add_what_they_are():
    model = model_of(num_hidden_layers=1, shared_experts=2, shared_width=6, parallel_dense=True, intermediate_size=24).eval()
    block = model.model.blocks[0]
    assert (block.moe.shared.count, block.moe.shared.width, block.mlp.width) == (2, 6, 24)
    ids = torch.randint(0, 40, (1, 7))
    seen = {}
    for name, part in (("norm", block.norm), ("moe", block.moe), ("mlp", block.mlp), ("block", block)):
        part.register_forward_hook(lambda module, args, out, name=name: seen.update({name: (args[0], out)}))
    model(ids)
    x, h = seen["norm"]
    assert torch.equal(seen["mlp"][0], h)
    torch.testing.assert_close(seen["block"][1][0], x + seen["moe"][1][0] + seen["mlp"][1])


def test_the_dense_twin_has_no_experts_and_trains():
    model = model_of(experts=0, intermediate_size=20)
    ids = torch.randint(0, 40, (2, 9))
    out = model(ids, labels=ids, output_routings=True)
    out.loss.backward()
    assert out.routings == () and out.balance_losses == {}
    assert sum(p.numel() for p in model.model.blocks[0].mlp.parameters()) == 3 * 16 * 20


def test_balance_losses_are_in_the_loss_and_reach_the_router_also_when_recomputed():
    grads = []
    ids = torch.randint(0, 40, (2, 20))
    for checkpoint in (False, True):
        model = model_of(balance={"switch": 0.5}).train()
        if checkpoint:
            model.gradient_checkpointing_enable()
        out = model(ids, labels=ids, output_routings=True)
        plain = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(out.loss, plain + out.balance_losses["switch"])
        assert out.balance_losses["switch"] > 0.9  # two layers, each at least 1 at balance, half of that
        out.balance_losses["switch"].backward()
        grads.append(model.model.blocks[0].moe.router.score.weight.grad.clone())
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(grads[0], grads[1])
    with pytest.raises(BadInput, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_a_random_router_draws_the_same_numbers_when_recomputed():
    drawn = []

    def note(module, args):
        drawn.append(torch.rand(3, generator=args[1].generator).tolist())

    model = model_of().train()
    model.gradient_checkpointing_enable()
    for block in model.model.blocks:
        block.moe.router.needs = frozenset({"generator"})
        block.moe.router.register_forward_pre_hook(note)
    ids = torch.randint(0, 40, (2, 6))
    model(ids, labels=ids).loss.backward()
    assert len(drawn) == 4 and drawn[0] != drawn[1]
    assert drawn[:2] == drawn[:1:-1]  # the backward pass recomputes the last block first
    drawn.clear()
    model(ids, labels=ids)
    first = list(drawn)
    model(ids, labels=ids)
    assert drawn[2:] != first, "another forward draws others"


def test_items_in_batch_make_micro_steps_add_up_to_the_whole():
    model = model_of(balance={"z": 0.1}).train()
    ids = torch.randint(0, 40, (4, 9))
    labels = ids.clone()
    labels[0, 3:] = -100
    whole = model(ids, labels=labels).loss
    items = (labels[:, 1:] != -100).sum()
    parts = [model(ids[i : i + 2], labels=labels[i : i + 2], num_items_in_batch=items) for i in (0, 2)]
    share = [(labels[i : i + 2, 1:] != -100).sum() / items for i in (0, 2)]
    aux = sum(s * p.balance_losses["z"] for s, p in zip(share, parts, strict=True))
    plain = model.eval()(ids, labels=labels).loss
    torch.testing.assert_close(sum(p.loss for p in parts), plain + aux)
    torch.testing.assert_close(whole, plain + aux, rtol=0.05, atol=0)  # z is a mean of squares: only nearly linear in the parts


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        ids = (torch.arange(17) * 3 + i) % 24
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer_trains_saves_and_moves_the_controllers(tmp_path, checkpointing):
    model = model_of(vocab_size=24, balance={"bias": 0.1, "switch": 0.01}, router_options={"convention": "sigmoid"})
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=7, learning_rate=5e-3,
        report_to=[], save_steps=7, logging_steps=1, use_cpu=True, disable_tqdm=True, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=[MoesaicCallback()])
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.3
    assert int(model.model.step) == 7
    bias_E = model.model.blocks[0].moe.router.bias_E
    odd_E = (bias_E / 0.1).round()  # seven steps of 0.1 up or down: counts are gathered over both micro-steps
    torch.testing.assert_close(bias_E, 0.1 * odd_E)
    assert (odd_E.int() % 2 == 1).all()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-7")
    assert torch.equal(again.model.blocks[0].moe.router.bias_E, bias_E)
    assert trainer.evaluate(Rows())["eval_loss"] < losses[0]


def test_a_masked_model_hides_every_seventh_token_and_does_not_generate():
    model = model_of(causal=False, mask_token_id=39).train()
    seen = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    ids = torch.randint(0, 39, (2, 14))
    model(ids, labels=ids)
    model.after_step()
    model(ids, labels=ids)
    assert (seen[0] == 39).nonzero()[:, 1].tolist() == [0, 7] * 2
    assert (seen[1] == 39).nonzero()[:, 1].tolist() == [6, 13] * 2
    with pytest.raises(BadInput, match="does not generate"):
        model.generate(ids)


def test_attention_implementations_agree():
    ids, mask = torch.randint(0, 40, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[0, :3] = 0
    model = model_of(num_key_value_heads=2, router="attention_aware").eval()
    found = {}
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        found[name] = model(ids).logits, model(ids, attention_mask=mask).logits[mask.bool()]
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_beams_reorder_what_a_router_keeps_in_the_cache():
    model = model_of(router="attention_aware", initializer_range=0.5).eval()
    ids = torch.randint(0, 40, (2, 6))
    settings = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


def test_a_capacity_that_depends_on_the_call_decodes_without_a_cache():
    model = model_of(router_options={"k": 1, "eval_capacity_factor": 1.0}).eval()
    ids = torch.randint(0, 40, (1, 9))
    assert model(ids).past_key_values is None
    with pytest.raises(BadInput, match="cannot decode with a cache: its capacity in evaluation"):
        model(ids, use_cache=True)
    slow = ids
    for _ in range(4):
        slow = torch.cat([slow, model(slow).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), slow)


def test_a_cache_of_fixed_size_is_refused():
    ids = torch.randint(0, 40, (1, 9))
    with pytest.raises(BadInput, match=r"attention_mask is .*cache_implementation=static\), .* not supported"):
        model_of().eval().generate(ids, max_new_tokens=4, cache_implementation="static")


@pytest.mark.slow
def test_compiled_equals_eager():
    model = model_of(k=2)
    ids = torch.randint(0, 40, (2, 16))
    compiled = torch.compile(model, backend="aot_eager")
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        loss = run(ids, labels=ids).loss
        loss.backward()
        grads.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
