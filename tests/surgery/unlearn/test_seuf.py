"""SEUF and its losses: what its card says must hold, and that nothing but one expert and one router changes."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch.nn.functional import one_hot

from moesaic.core.documents import Document
from moesaic.core.errors import BadInput
from moesaic.surgery.attribution import attribution, choices, overlap
from moesaic.surgery.objective import Given, layer_output, nats
from moesaic.surgery.sliced import put_back, take_out
from moesaic.surgery.unlearn.ga import GA
from moesaic.surgery.unlearn.graddiff import GradDiff
from moesaic.surgery.unlearn.npo import NPO, npo_loss
from moesaic.surgery.unlearn.rmu import RMU
from moesaic.surgery.unlearn.seuf import LOSSES, SEUF, anchor_loss
from moesaic.training.finetune import finetune
from moesaic.view import tiny, view

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
BATCH = {"forget": IDS, "retain": IDS.flip(1)}


def build(name="Qwen3Moe", implementation="moesaic"):
    model = tiny.build(getattr(transformers, f"{name}ForCausalLM"))
    model.set_experts_implementation(implementation)
    return model


class Bytes:
    """A tokenizer of letters, for models with a tiny vocabulary."""

    eos_token_id, bos_token_id = 0, None

    def __call__(self, text, **_):
        if isinstance(text, list):
            return {"input_ids": [self(t)["input_ids"] for t in text]}
        return {"input_ids": [1 + ord(c) % 90 for c in text]}

    def __len__(self):
        return 128


TEXT = [Document("the cat sat on the mat, and sat. " * n, "a") for n in (3, 1, 2)]
OTHER = [Document("0123456789 9876543210 " * n, "b") for n in (3, 2)]


def given(steps=3, seq_len=16):
    return Given(Bytes(), {"forget": TEXT, "retain": OTHER}, seq_len=seq_len, steps=steps)


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral", "GptOss", "DeepseekV3", "Olmoe"])
@pytest.mark.parametrize("implementation", ["moesaic", "eager"])
def test_an_expert_apart_runs_like_the_fused_one_gradients_included(name, implementation):
    """Twin: the fused tensor, with its gradient's slice. Interleaved, biased and transposed layouts among them."""
    model, twin = build(name, implementation), build(name, implementation)
    block, e = view(model)[0], 3
    (part,) = take_out(block, [e])
    block.experts.requires_grad_(False)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in twin.named_parameters()}
    loss, want = nats(model, IDS), nats(twin, IDS)
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
    loss.backward()
    want.backward()
    for key, value in part.named_parameters():
        full = getattr(view(twin)[0].experts, key).grad
        torch.testing.assert_close(value.grad[0], full[e], rtol=1e-3, atol=1e-6)
        assert value.grad.any() == full[e].any()
    own = type(view(twin)[0].experts)
    put_back(block)
    assert type(block.experts) is own
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("loss", LOSSES)
def test_all_else_keeps_its_bits_weight_decay_and_momentum_included(loss):
    model = build().to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method, have = SEUF(loss=loss), given()
    learn = method.prepare(model, have)
    losses = finetune(
        model, Bytes(), {name: have.texts[name] for name in method.texts}, learn, steps=3, lr=0.01, warmup=0, batch_size=2,
        seq_len=16, weight_decay=0.5, objective=method.loss,
    )  # fmt: skip
    method.finish(model)
    (edited,) = method.facts()["edited"]
    e, prefix = edited["expert"], f"model.layers.{edited['layer']}.mlp"
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{prefix}.experts.gate_up_proj", f"{prefix}.experts.down_proj", f"{prefix}.gate.weight"}
    for name in changed - {f"{prefix}.gate.weight"}:
        now, was = model.state_dict()[name], before[name]
        assert not torch.equal(now[e], was[e])
        others = [i for i in range(8) if i != e]
        assert torch.equal(now[others], was[others]) and now.dtype is torch.bfloat16
    assert len(losses) == 3 and all(map(math.isfinite, losses))


def test_the_anchor_lies_in_0_to_2_and_a_descent_step_raises_the_target_logit():
    torch.manual_seed(3)
    for scale in (0.1, 1, 5):
        z_TE = (scale * torch.randn(40, 6)).requires_grad_()
        g_TE = z_TE.softmax(-1)
        one = (g_TE - one_hot(torch.full((40,), 2), 6)).square().sum(-1)
        assert one.min() >= 0 and one.max() <= 2
        torch.testing.assert_close(anchor_loss(g_TE, 2), one.mean())
        (grad_TE,) = torch.autograd.grad(one.sum(), z_TE)
        t = g_TE[:, 2]
        torch.testing.assert_close(grad_TE[:, 2], 2 * t * (2 * t - 1 - g_TE.square().sum(-1)), rtol=1e-4, atol=1e-6)
        assert bool((grad_TE[:, 2] <= -2 * t * (1 - t).square() + 1e-6).all())
    assert anchor_loss(one_hot(torch.tensor([2, 2]), 6).float(), 2) == 0
    assert anchor_loss(one_hot(torch.tensor([1, 3]), 6).float(), 2) == 2


@pytest.mark.parametrize("name", ["Qwen3Moe", "DeepseekV3"])
def test_attribution_sums_to_1_and_weighs_sequences_alike(name):
    model = build(name)
    found = attribution(model, Bytes(), TEXT, context=64)
    assert all(abs(float(s.sum()) - 1) < 1e-6 for s in found.values())
    pieces, want = [], torch.zeros(8, dtype=torch.float64)
    for document in TEXT:
        ids = [0, *Bytes()(document.text)["input_ids"]]
        pieces += [ids[at : at + 64] for at in range(0, len(ids), 64)]
    block, seen = view(model)[0], []
    with block.on_choice(lambda choice, block: seen.append(block.logits(choice)), scores=True), torch.no_grad():
        for ids in pieces:
            model(torch.tensor([ids]))
    for logits_TE in seen:
        want += logits_TE.double().softmax(-1).mean(0) / len(pieces)
    torch.testing.assert_close(found[block.layer], want, rtol=1e-4, atol=1e-6)


def test_the_target_is_the_most_used_expert_of_the_whole_model_or_the_one_named():
    model = build()
    method = SEUF()
    method.prepare(model, given())
    (edited,) = method.facts()["edited"]
    found = attribution(model, Bytes(), TEXT, 16)
    assert max(float(s.max()) for s in found.values()) == pytest.approx(edited["attribution"])
    method = SEUF(target="2:5+0:1")
    method.prepare(build(), given())
    assert [(row["layer"], row["expert"]) for row in method.facts()["edited"]] == [(2, 5), (0, 1)]
    method = SEUF(experts=3)
    assert len(method.prepare(build(), given())) >= 3 * 2 + 1
    scores = [row["attribution"] for row in method.facts()["edited"]]
    assert scores == sorted(scores, reverse=True) and len(scores) == 3
    random = SEUF(target="random", experts=2)
    random.prepare(build(), given())
    assert len(random.facts()["edited"]) == 2


@pytest.mark.parametrize("loss", LOSSES)
def test_without_anchor_and_with_all_trainable_it_is_the_plain_method(loss):
    options = {"layer": 2} if loss == "rmu" else {}
    plain = {"ga": GA, "graddiff": GradDiff, "npo": NPO, "rmu": RMU}[loss](**options)
    one, other = build(), build()
    method = SEUF(loss=loss, anchor=0.0, scope="all", target="2:1")
    method.prepare(one, given())
    plain.prepare(other, given())
    (a := method.loss(one, BATCH)).backward()
    (b := plain.loss(other, BATCH)).backward()
    torch.testing.assert_close(a, b)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


def test_npo_is_log_2_at_no_change_and_tends_to_gradient_ascent():
    assert npo_loss(torch.zeros(3), 0.1).item() == pytest.approx(2 / 0.1 * math.log(2))
    method, model = NPO(beta=0.1, retain_weight=0.0), build()
    method.prepare(model, given())
    assert method.loss(model, BATCH).item() == pytest.approx(20 * math.log(2), rel=1e-5)
    with torch.no_grad():
        for p in method.frozen.parameters:
            p.add_(0.02 * torch.randn_like(p))
    now = [p.data_ptr() for p in model.parameters()]
    grads = {}
    for beta in (1e-4, 0.5):
        method.beta = beta
        model.zero_grad()
        method.loss(model, BATCH).backward()
        grads[beta] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert now == [p.data_ptr() for p in model.parameters()], "the reference hands the parameters back"
    model.zero_grad()
    (GA().forget(model, BATCH) * (IDS.shape[1] - 1)).backward()  # GA per token, NPO per sequence
    ascent = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[1e-4], ascent, rtol=1e-2, atol=1e-3 * float(ascent.abs().max()))
    assert not torch.allclose(grads[0.5], ascent, rtol=1e-2, atol=1e-3 * float(ascent.abs().max()))


def test_rmu_is_0_iff_the_activation_is_the_target_and_its_retain_term_is_0_at_the_start():
    model, method = build(), RMU(layer=1, steer=3.0)
    method.prepare(model, given())
    assert method.u_D.norm() == pytest.approx(1) and method.u_D.min() >= 0
    assert method.retain(model, BATCH).item() == 0
    want = (layer_output(model, method.module, IDS).float() - 3 * method.u_D).square().mean()
    torch.testing.assert_close(method.forget(model, BATCH), want)
    handle = method.module.register_forward_hook(lambda m, a, out: (3 * method.u_D).expand_as(out), prepend=True)
    assert method.forget(model, BATCH).item() == 0
    handle.remove()
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in method.learns(model)} == {f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)}
    assert RMU().plan(model)["trains"].endswith("layers 0 to 2")


def test_divergence_retain_is_0_at_the_start_and_grows():
    model, method = build(), GradDiff(retain="kl", forget_weight=0.0)
    method.prepare(model, given())
    assert method.loss(model, BATCH).item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
    assert method.loss(model, BATCH).item() > 0.01


def test_overlap_of_a_routing_with_itself_is_1_and_with_another_less():
    model = build()
    before = choices(model, Bytes(), TEXT, 32)
    assert overlap(before, choices(model, Bytes(), TEXT, 32)) == 1
    with torch.no_grad():
        view(model)[1].router.weight.neg_()
    assert overlap(before, choices(model, Bytes(), TEXT, 32)) < 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loss": "magic"}, "one of ga"),
        ({"loss_options": {"colour": 1}}, "its options are beta"),
        ({"target": "9:1"}, "layers 0"),
        ({"target": "1:99"}, "experts 0 to 7"),
        ({"target": "one"}, "layer:expert"),
        ({"target": "1:1+1:1"}, "once"),
        ({"experts": 0}, "at least 1"),
        ({"experts": 999}, "has 32"),
        ({"scope": "some"}, "expert, all"),
        ({"loss": "npo", "loss_options": {"beta": 0}}, "positive"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(options, says):
    model = build()
    with pytest.raises(BadInput, match=says):
        SEUF(**options).plan(model)
