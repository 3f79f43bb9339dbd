"""Routing: captured inside, computed outside, hooked and replaced."""

from __future__ import annotations

import pytest
import torch

import moesaic
from moesaic.core.errors import BadInput
from moesaic.view import tiny
from moesaic.view.policy import Policy


def routings(view, model, ids, **more):
    """What every block did in one call, by block name."""
    seen = {}
    with view.on_route(lambda routing, block: seen.__setitem__(block.name, routing)), torch.no_grad():
        model(input_ids=ids, **more)
    return seen


def test_hooks_see_what_the_router_returned(model, ids):
    """The captured routing is the router module's own output, whatever the architecture."""
    view = moesaic.view(model)
    raw = {}
    handles = [
        block.router.register_forward_hook(lambda module, args, output, name=block.name: raw.__setitem__(name, output))
        for block in view
    ]
    seen = routings(view, model, ids)
    for handle in handles:
        handle.remove()
    assert set(seen) == {block.name for block in view}
    for block in view:
        scores, weights, chosen = raw[block.name][:3]
        routing = seen[block.name]
        assert torch.equal(routing.experts_TK, chosen)
        assert torch.equal(routing.weights_TK, weights)
        assert torch.equal(routing.logits_TE, scores.log() if block.scores == "probabilities" else scores)
        assert routing.experts_TK.shape == (ids.numel(), block.top_k)


def test_probabilities_are_recognised(make, ids):
    gemma, qwen = moesaic.view(make("Gemma4ForCausalLM")), moesaic.view(make("Qwen3MoeForCausalLM"))
    routing = next(iter(routings(gemma, gemma.model, ids).values()))
    routings(qwen, qwen.model, ids)
    assert {block.scores for block in gemma} == {"probabilities"}
    assert {block.scores for block in qwen} == {"router"}
    torch.testing.assert_close(routing.logits_TE.exp().sum(1), torch.ones(ids.numel()))


@pytest.mark.parametrize("flat", [True, False])
def test_route_outside_equals_inside(model, ids, flat):
    view = moesaic.view(model)
    inputs = {}
    handles = [
        block.router.register_forward_pre_hook(lambda module, args, name=block.name: inputs.__setitem__(name, args[0]))
        for block in view
    ]
    seen = routings(view, model, ids)
    for handle in handles:
        handle.remove()
    for block in view:
        x = inputs[block.name]
        with torch.no_grad():
            outside = block.route(x.reshape(-1, x.shape[-1]) if flat else x.reshape(*ids.shape, -1))
        inside = seen[block.name]
        assert torch.equal(outside.experts_TK, inside.experts_TK)
        assert torch.equal(outside.weights_TK, inside.weights_TK)
        assert torch.equal(outside.logits_TE, inside.logits_TE)
        torch.testing.assert_close(outside.probs_TE.sum(1), torch.ones(ids.numel()))


def test_route_needs_what_the_block_needs(make):
    """A hash router cannot route x alone; with the token ids it does what the block does."""
    model = make("DeepseekV4ForCausalLM")
    block = next(b for b in moesaic.view(model) if hasattr(b.router, "tid2eid"))
    x, ids = torch.randn(1, 5, 32), torch.randint(8, 80, (1, 5))
    with pytest.raises(BadInput, match="needs more than x"):
        block.route(x)
    assert torch.equal(moesaic.view(model)[block.name].route(x, input_ids=ids).experts_TK, block.router.tid2eid[ids[0]])


def test_route_leaves_its_input_alone_in_training(make):
    """Mixtral multiplies noise into its input, in place, when it trains."""
    model = make("MixtralForCausalLM", router_jitter_noise=0.5).train()
    x = torch.randn(1, 4, 32)
    kept = x.clone()
    moesaic.view(model)[0].route(x)
    assert torch.equal(x, kept)


def test_a_replaced_routing_is_what_runs(model, ids, logits):
    """All tokens to expert 1 with weight 1: the block's experts see exactly that, and the output follows."""
    view = moesaic.view(model)
    before = logits(model, ids)
    block, seen = view[0], []

    def all_to_one(routing, block):
        ones = torch.ones_like(routing.experts_TK[:, :1])
        return routing.replace(experts_TK=ones, weights_TK=ones.float())

    watch = block.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1:]))
    with block.on_route(all_to_one):
        watch.remove()
        watch = block.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1:]))
        changed = logits(model, ids)
    watch.remove()
    chosen, weights = seen[-1]
    assert chosen.tolist() == [[1]] * ids.numel()
    assert weights.tolist() == [[1.0]] * ids.numel()
    assert not torch.equal(changed, before)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("implementation", ["eager", "moesaic", "batched_mm"])
def test_empty_slots_add_nothing(qwen, ids, logits, implementation):
    """A slot of -1 equals weight zero there, under every implementation."""
    qwen.set_experts_implementation(implementation)
    view = moesaic.view(qwen)

    def drop_last(routing, block):
        return routing.replace(experts_TK=torch.where(torch.arange(2) < 1, routing.experts_TK, -1))

    def zero_last(routing, block):
        return routing.replace(weights_TK=torch.where(torch.arange(2) < 1, routing.weights_TK, 0))

    with view.on_route(drop_last):
        dropped = logits(qwen, ids)
    with view.on_route(zero_last):
        torch.testing.assert_close(dropped, logits(qwen, ids), rtol=1e-5, atol=1e-6)


def test_experts_hook_sees_and_replaces(qwen, ids, logits):
    view = moesaic.view(qwen)
    before, seen = logits(qwen, ids), []

    def silence(x_TD, routing, y_TD, block):
        seen.append((x_TD.shape, routing.experts_TK.shape, y_TD.shape))
        return torch.zeros_like(y_TD)

    with view[1].on_experts(silence):
        silent = logits(qwen, ids)
    assert seen == [((14, 32), (14, 2), (14, 32))]
    assert not torch.equal(silent, before)
    kept = [view[1].bank[e] for e in range(8)]
    for e in range(8):
        view[1].bank[e] = kept[e].map(torch.zeros_like)
    assert torch.equal(logits(qwen, ids), silent)


def test_hooks_come_off(qwen, ids):
    """Handles work once, in any order, as context managers; a model that nobody listens to has no hooks."""

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in qwen.modules())

    view = moesaic.view(qwen)
    bare = hooks()
    calls = []
    first = view[0].on_route(lambda routing, block: calls.append("first"))
    second = view[0].on_route(lambda routing, block: calls.append("second"))
    assert hooks() > bare
    first.remove()
    first.remove()
    qwen(input_ids=ids)
    assert calls == ["second"]
    second.remove()
    assert hooks() == bare
    with pytest.raises(ZeroDivisionError), view.on_route(lambda routing, block: 1 / 0):
        qwen(input_ids=ids)
    assert hooks() == bare


def test_bad_hooks_are_named(qwen, ids):
    view = moesaic.view(qwen)
    bad = {
        "returns None or a Routing": lambda r, b: 3,
        "for 14 tokens": lambda r, b: r.replace(experts_TK=r.experts_TK[:3], weights_TK=r.weights_TK[:3]),
        "chose expert 8": lambda r, b: r.replace(experts_TK=torch.full_like(r.experts_TK, 8)),
    }
    for message, fn in bad.items():
        with view.on_route(fn), pytest.raises(BadInput, match=message):
            qwen(input_ids=ids)
    with view.on_experts(lambda x, r, y, b: y[:1]), pytest.raises(BadInput, match="must return"):
        qwen(input_ids=ids)


def test_gradients_flow_through_hooks(qwen, ids):
    qwen.train()
    losses = []
    with moesaic.view(qwen).on_route(lambda routing, block: losses.append(routing.logits_TE.square().mean())):
        qwen(input_ids=ids)
    sum(losses).backward()
    assert all(block.router.weight.grad.abs().sum() > 0 for block in moesaic.view(qwen))


def test_two_views_and_a_copied_model_do_not_mix(qwen, ids):
    import copy

    calls = []
    one, two = moesaic.view(qwen), moesaic.view(qwen)
    with one.on_route(lambda r, b: calls.append("one")), two.on_route(lambda r, b: calls.append("two")):
        clone = copy.deepcopy(qwen)
        qwen(input_ids=ids)
    assert sorted(calls) == ["one"] * 4 + ["two"] * 4
    assert moesaic.view(clone)[0].experts is not one[0].experts
    clone(input_ids=ids)


def test_padding_does_not_change_real_tokens(model, ids, logits):
    """Left padding: the routing of real tokens is what it is without padding."""
    padded = torch.cat([torch.full((2, 3), 5), ids], 1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 7)], 1).long()
    if not set(getattr(model.config.get_text_config(), "layer_types", None) or []) <= {"full_attention", "sliding_attention"}:
        pytest.skip("layers with a running state see padding")
    view = moesaic.view(model)
    alone, beside = routings(view, model, ids), routings(view, model, padded, attention_mask=mask)
    for name, routing in alone.items():
        real = beside[name].experts_TK.reshape(2, 10, -1)[:, 3:].reshape(14, -1)
        assert (real.sort(1).values == routing.experts_TK.sort(1).values).float().mean() > 0.95


def test_every_tiny_block_has_a_router_of_its_own():
    """Structural search alone (no recorder named) finds the same router, for a spread of architectures."""
    from moesaic.view import discover

    for name in ("qwen3_moe", "gpt_oss", "afmoe", "lfm2_moe", "gemma4", "inkling", "dots3_note"):
        architecture = next(a for a in tiny.architectures() if a.name == name)
        for model_class in tiny.model_classes(architecture):
            for found in discover.find(tiny.build(model_class)):
                assert discover._router(found.parent, found.experts, ()) is found.router, found.name


def test_a_block_routes_under_a_policy_of_its_own(qwen):
    blocks = moesaic.view(qwen)
    x = torch.randn(5, blocks[1].width)
    plain = blocks[1].route(x)
    with blocks.policy(without=[1, 6]):
        expected = blocks[1].route(x)
        found = blocks[1].route_under(Policy(without=[0]), x)  # the policy in force gives way, here alone
        again = blocks[1].route(x)
    assert torch.equal(blocks[1].route_under(Policy(without=[1, 6]), x).experts_TK, expected.experts_TK)
    assert not bool((found.experts_TK == 0).any()) and torch.equal(again.experts_TK, expected.experts_TK)
    assert torch.equal(blocks[1].route_under(Policy(), x).experts_TK, plain.experts_TK)
