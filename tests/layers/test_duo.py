"""Card: routing.md, "Duo-LLM": what must hold of the layer, the budget and the oracle."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy, rms_norm

from moesaic.balancing.balancer import Scope
from moesaic.balancing.budget import Budget
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.layers.duo import Duo, oracle


def stack(depth, skip=True):
    return [Duo(8, 2 + skip, skip=skip).eval() for _ in range(depth)]


def run(layers, x, pattern):
    for layer, option in zip(layers, pattern, strict=True):
        layer.router.pattern = option
        x = x + layer(rms_norm(x, (8,)))[0]
        layer.router.pattern = None
    return x


def search(layers, x, targets, **options):
    steps = [lambda state, option, layer=layer: run([layer], state, [option]) for layer in layers]
    return oracle(
        x, steps, lambda state: cross_entropy(state, targets, reduction="none"), layers[0].router.num_experts, **options
    )


def all_losses(layers, x, targets, big=None):
    options = range(layers[0].router.num_experts)
    patterns = [p for p in itertools.product(options, repeat=len(layers)) if big is None or p.count(0) == big]
    return patterns, torch.stack([cross_entropy(run(layers, x, p), targets, reduction="none") for p in patterns])


@pytest.mark.parametrize("big", [None, 0, 1, 3])
def test_the_tree_equals_brute_force_and_bounds_every_pattern(big):
    layers, x, targets = stack(3), torch.randn(20, 8), torch.randint(0, 8, (20,))
    found = search(layers, x, targets, big=big)
    patterns, losses = all_losses(layers, x, targets, big)
    torch.testing.assert_close(found.loss_T, losses.min(0).values)
    assert [tuple(p) for p in found.pattern_TL.tolist()] == [patterns[i] for i in losses.argmin(0)]
    assert (found.loss_T <= losses + 1e-6).all()
    assert found.evaluations <= 3 + 9 + 27


def test_more_options_never_raise_the_oracles_loss_and_one_big_layer_can_beat_all_big():
    layers, x, targets = stack(4), torch.randn(60, 8), torch.randint(0, 8, (60,))
    steps = [lambda state, option, layer=layer: run([layer], state, [option]) for layer in layers]
    loss = lambda state: cross_entropy(state, targets, reduction="none")  # noqa: E731
    one, two, three = (oracle(x, steps, loss, n).loss_T for n in (1, 2, 3))
    assert (two <= one).all() and (three <= two).all()
    torch.testing.assert_close(one, loss(run(layers, x, [0] * 4)))
    assert search(layers, x, targets, big=1).loss_T.mean() < one.mean(), "the selection effect of a minimum"


def test_all_big_is_the_big_model_and_skip_leaves_the_stream():
    (layer,) = stack(1)
    x = torch.randn(9, 8)
    layer.router.pattern = 0
    torch.testing.assert_close(layer(x)[0], layer.bank(x, torch.tensor([0, 9, 9])))
    layer.router.pattern = 2
    y, routing = layer(x)
    assert torch.equal(y, torch.zeros_like(x))
    assert routing.counts_E().tolist() == [0, 0, 9], "skips count as a choice"
    layer.router.pattern = torch.arange(9) % 3
    assert layer(x)[1].counts_E().tolist() == [3, 3, 3]
    assert layer.bank.widths == [32, 2]


def test_modes_random_soft_and_hard():
    x = torch.randn(3000, 8)
    draw = Duo(8, 2, skip=False, mode="random").train()
    counts = draw(x, RoutingContext(mode="train"))[1].counts_E() / 3000
    torch.testing.assert_close(counts, torch.full((2,), 0.5), atol=0.04, rtol=0)
    assert draw.eval()(x)[1].counts_E().tolist() == [3000, 0]
    soft = Duo(8, 3).train()
    y, routing = soft(x[:7], RoutingContext(mode="train"))
    p = routing.probs_TE
    ends = [soft.bank(x[:7], torch.tensor(o)) for o in ([0, 7, 7], [0, 0, 7])]
    torch.testing.assert_close(y, p[:, :1] * ends[0] + p[:, 1:2] * ends[1])
    assert torch.equal(soft.eval()(x[:7])[1].weights_TK[:, 0], (p.argmax(1) != 2).float())


def test_the_budget_pushes_all_layers_alike():
    layers = [Duo(8, 3, mode="hard").train() for _ in range(3)]
    x = torch.randn(40, 8)
    routings = [layer(x, RoutingContext(mode="train"))[1] for layer in layers]
    loss = Budget(target=0.9).over(routings, Scope())
    big = torch.stack([r.probs_TE[:, 0].mean() for r in routings])
    torch.testing.assert_close(loss, (big.mean() - 0.9).square())
    grads = torch.autograd.grad(loss, [r.probs_TE for r in routings])
    for g in grads:
        torch.testing.assert_close(g, grads[0])
        assert (g[:, 0] < 0).all() and (g[:, 1:] == 0).all()


def test_refusals():
    with pytest.raises(BadInput, match="experts=2, skip=True"):
        Duo(8, 2)
    with pytest.raises(BadInput, match="big=5"):
        search(stack(2), torch.randn(2, 8), torch.zeros(2, dtype=torch.long), big=5)
    with pytest.raises(BadInput, match="target=2"):
        Budget(target=2)
