"""Lossy modes: neutral settings change no bit, each does what its card says, and the loss is measured."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from moesaic.core.errors import BadInput
from moesaic.core.registry import entries
from moesaic.core.routing import Dispatch
from moesaic.kernels.slots import dispatch_slots
from moesaic.serving.streamed import load_streamed
from moesaic.serving.streamed.loss import measure
from moesaic.serving.streamed.lossy.mode import keep_pairs, without
from moesaic.serving.streamed.lossy.skip import Skip
from moesaic.serving.streamed.lossy.substitute import prefer
from moesaic.trace.sweep import build
from moesaic.view import load, quiet
from moesaic.view.implementation import experts_forward

NEUTRAL = {"skip": "skip:threshold=0", "substitute": "substitute:among=2", "defer": "defer:experts=0"}
STRONG = {"skip": "skip:threshold=0.45", "substitute": "substitute:first=1+among=6", "defer": "defer:experts=2"}


@pytest.fixture(autouse=True)
def silent():
    with quiet():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("lossy")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=4, num_experts=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts_per_tok=2, initializer_range=0.2,
        norm_topk_prob=True,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    model = load(folder).model
    ids = torch.randint(0, 300, (1, 9))
    with torch.no_grad():
        return SimpleNamespace(folder=folder, ids=ids, logits=model(ids).logits, tokens=answer(model, ids))


def answer(model, ids, tokens=12):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None
    )


def test_every_mode_is_tested_here():
    assert {entry.name for entry in entries("lossy")} == NEUTRAL.keys() == STRONG.keys()
    assert not any(entry.exact for entry in entries("lossy"))


@pytest.mark.parametrize("mode", NEUTRAL.values())
def test_neutral_settings_change_no_bit(checkpoint, mode):
    with load_streamed(checkpoint.folder, resident=0.3, lossy=mode) as streamed, torch.no_grad():
        assert streamed.engine.exact
        assert torch.equal(streamed.model(checkpoint.ids).logits, checkpoint.logits)
        assert torch.equal(answer(streamed.model, checkpoint.ids), checkpoint.tokens)
        assert streamed.stats.overlap == 1


@pytest.mark.parametrize("mode", STRONG.values())
def test_modes_change_the_output_say_so_and_can_rest(checkpoint, mode):
    with load_streamed(checkpoint.folder, resident=0.3, lossy=mode) as streamed, torch.no_grad():
        answer(streamed.model, checkpoint.ids)
        assert not streamed.engine.exact
        assert 0.2 < streamed.stats.overlap < 1
        with streamed.engine.without_loss():
            assert torch.equal(streamed.model(checkpoint.ids).logits, checkpoint.logits)
            assert torch.equal(answer(streamed.model, checkpoint.ids), checkpoint.tokens)


@pytest.mark.parametrize("mode", STRONG.values())
def test_everything_resident_leaves_nothing_to_lose(checkpoint, mode):
    """After a first pass that brings all experts in."""
    with load_streamed(checkpoint.folder, resident=1.0, lossy=mode) as streamed, torch.no_grad():
        with streamed.engine.without_loss():
            streamed.model(torch.arange(300)[None])
        assert torch.equal(streamed.model(checkpoint.ids).logits, checkpoint.logits)


@pytest.mark.parametrize("mode", ["skip", "substitute"])
def test_less_is_read(checkpoint, mode):
    read = []
    for lossy in (None, STRONG[mode]):
        with load_streamed(checkpoint.folder, resident=0.3, lossy=lossy) as streamed:
            answer(streamed.model, checkpoint.ids, 24)
            read.append(streamed.stats.read_bytes)
    assert read[1] < 0.9 * read[0]


# Skip


@pytest.mark.parametrize("renormalise", [True, False])
def test_skip_against_a_loop(renormalise):
    ids_TK = torch.stack([torch.randperm(9)[:4] for _ in range(13)])
    ids_TK[3, 2] = 9  # an empty slot
    weights_TK = torch.rand(13, 4) + 0.01
    absent_E = torch.arange(9) % 2 == 0
    layer = SimpleNamespace(experts=9)
    changed = Skip(0.3, renormalise).choose(layer, dispatch_slots(ids_TK, weights_TK, 9), ids_TK, absent_E)
    expected, lost = torch.zeros(13, 9), 0
    for t in range(13):
        pairs = [(int(e), float(w)) for e, w in zip(ids_TK[t], weights_TK[t], strict=True) if e < 9]
        total, largest = sum(w for _, w in pairs), max(w for _, w in pairs)
        kept = [(e, w) for e, w in pairs if not absent_E[e] or w / total >= 0.3 or w == largest]
        lost += len(pairs) - len(kept)
        scale = total / sum(w for _, w in kept) if renormalise else 1
        for e, w in kept:
            expected[t, e] = w * scale
    got = torch.zeros(13, 9)
    got[changed.dispatch.token_S, changed.dispatch.expert_S] = changed.dispatch.weight_S
    torch.testing.assert_close(got, expected)
    assert changed.lost == lost > 5
    ran = [{int(e) for e in row if 0 <= e < 9} for row in changed.ids_TK]
    assert ran == [set(torch.nonzero(row).flatten().tolist()) for row in expected]


def test_skip_never_drops_the_largest():
    ids_TK, weights_TK = torch.arange(8).view(2, 4), torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4]])
    changed = Skip(1.0).choose(
        SimpleNamespace(experts=8), dispatch_slots(ids_TK, weights_TK, 8), ids_TK, torch.ones(8, dtype=torch.bool)
    )
    assert changed.dispatch.expert_S.tolist() == [0, 1, 2, 3, 7]  # of equals none is less than the largest
    torch.testing.assert_close(changed.dispatch.weight_S, torch.tensor([0.25, 0.25, 0.25, 0.25, 1.0]))


def test_keeping_pairs_keeps_a_dispatch():
    ids_TK, weights_TK = torch.randint(0, 5, (7, 3)), torch.rand(7, 3)
    dispatch = dispatch_slots(ids_TK, weights_TK, 5)
    keep_S = torch.rand(21) < 0.5
    kept = keep_pairs(dispatch, keep_S)
    again = Dispatch.sort(dispatch.token_S[keep_S], dispatch.expert_S[keep_S], dispatch.weight_S[keep_S], 5, 7)
    for ours, theirs in ((kept.token_S, again.token_S), (kept.weight_S, again.weight_S), (kept.offsets_E1, again.offsets_E1)):
        assert torch.equal(ours, theirs)
    assert without(None, dispatch, keep_S) is None


# Substitute


def test_prefer_against_a_loop():
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        experts, slots, among, first = 11, 4, 7, int(torch.randint(0, 4, (1,), generator=generator))
        score_TE = torch.rand(5, experts, generator=generator)
        here_E = torch.rand(experts, generator=generator) < 0.4
        best_TM = score_TE.argsort(1, descending=True)[:, :among]
        shuffled_TM = best_TM[:, torch.randperm(among, generator=generator)]
        chosen_TK = prefer(best_TM[:, :slots], shuffled_TM, score_TE.gather(1, shuffled_TM), here_E, first)
        for t in range(5):
            ranked = best_TM[t].tolist()
            always, others = ranked[:first], ranked[first:]
            expected = [*always, *[e for e in others if here_E[e]], *[e for e in others if not here_E[e]]][:slots]
            assert set(chosen_TK[t].tolist()) == set(expected)
            assert set(ranked[:first]) <= set(chosen_TK[t].tolist())


def test_substitutes_have_the_routers_own_weights(checkpoint):
    """In a pass of one token, what runs is what the router would weigh if it had to take these experts."""
    with load_streamed(checkpoint.folder, resident=0.3, lossy=STRONG["substitute"]) as streamed, torch.no_grad():
        streamed.model(checkpoint.ids)
        layer, resident = streamed.engine.layers[1], load(checkpoint.folder).model
        router = resident.model.layers[1].mlp.gate
        x = torch.randn(3, 64)
        _, _, true_ids = router(x)
        _, weights, ids = layer.block.router(x)
        probabilities = torch.softmax(router(x)[0].float(), -1) if router(x)[0].min() < 0 else router(x)[0]
        taken = probabilities.gather(1, ids)
        torch.testing.assert_close(weights, taken / taken.sum(1, keepdim=True), rtol=1e-4, atol=1e-5)
        assert (ids == true_ids[:, :1]).any(1).all(), "the first choice stays"
        here = torch.from_numpy(streamed.engine.policy.resident(1))
        same = (ids.sort(1).values == true_ids.sort(1).values).all(1)
        assert not same.all()
        assert here[ids[~same][:, 1:]].all()


def test_substitute_needs_a_router():
    with pytest.raises(BadInput, match="first -1"):
        build("substitute:first=-1", "lossy", "--lossy")


# Defer


def naive_deferral(model, ids, experts, resident_by_layer):
    """The model with, in each layer but the last, these experts' outputs added to the next layer's output instead."""
    owed = {}
    handles = []

    def hook(number):
        def after(module, args, kwargs, y):
            x, chosen, weights = (*args, *kwargs.values())[:3]
            later = torch.isin(chosen, torch.tensor(sorted(resident_by_layer[number])))
            now = experts_forward(module, x, chosen, weights.masked_fill(later, 0.0))
            out = now + owed.pop(number - 1, 0)
            if later.any():
                owed[number] = experts_forward(module, x, chosen, weights.masked_fill(~later, 0.0))
            return out

        return after

    for number, layer in enumerate(model.model.layers):
        handles.append(layer.mlp.experts.register_forward_hook(hook(number), with_kwargs=True))
    with torch.no_grad():
        logits = model(ids).logits
    for handle in handles:
        handle.remove()
    assert not owed
    return logits


def test_deferral_applies_each_expert_once_to_its_own_hidden_state(checkpoint):
    with load_streamed(checkpoint.folder, resident=0.9, lossy="defer:experts=2") as streamed, torch.no_grad():
        mode, deferred = streamed.engine.lossy, {}
        choose = mode.put_off

        def watch(layer, dispatch, missing):
            deferred[layer.number] = choose(layer, dispatch, missing)
            assert deferred[layer.number] <= set(missing)
            return deferred[layer.number]

        mode.put_off = watch
        ours = streamed.model(checkpoint.ids).logits
        assert [len(deferred[i]) for i in range(4)] == [2, 2, 2, 0]
        assert streamed.stats.deferred == 6
    theirs = naive_deferral(load(checkpoint.folder).model, checkpoint.ids, 2, deferred)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - checkpoint.logits).abs().max() > 1e-2


# Measured loss


class Letters:
    """A tokenizer whose every token is one byte of text."""

    def decode(self, ids, **_):
        return "x" * len(ids)


@pytest.mark.parametrize("mode", [NEUTRAL["skip"], *STRONG.values()])
def test_the_loss_is_measured(checkpoint, mode):
    text = checkpoint.tokens[0].tolist()
    with load_streamed(checkpoint.folder, resident=0.3, lossy=mode) as streamed:
        streamed.tokenizer = Letters()
        loss = measure(streamed, [text, [5], text[:3]])
        assert loss.loss_tokens == len(text) - 1 + 2
        with torch.no_grad():
            model = load(checkpoint.folder).model
            nats = sum(
                torch.nn.functional.cross_entropy(
                    model(torch.tensor([ids[:-1]])).logits[0], torch.tensor(ids[1:]), reduction="sum"
                )
                for ids in (text, text[:3])
            )
        assert loss.bits_per_byte_exact == pytest.approx(float(nats) / math.log(2) / loss.loss_tokens, rel=1e-4)
        if mode == NEUTRAL["skip"]:
            assert (loss.kl_nats_per_token, loss.overlap, loss.bits_per_byte_difference) == (0, 1, 0)
        else:
            assert loss.kl_nats_per_token > 1e-3
            assert loss.bits_per_byte_difference != 0
            assert loss.overlap < 1
        with pytest.raises(BadInput, match="two tokens"):
            measure(streamed, [[4]])
