"""Card: routing.md, "Dr.LLM": what must hold of paths, search, loss and the layer."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, rms_norm

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.layers.drllm import DepthRouter, DrLLM, class_weights, focal_loss, path_of, run_path, search_path


def context(batch, length, **kw):
    return RoutingContext(sequence_ids=torch.arange(batch).repeat_interleave(length), **kw)


def test_counts_of_one_are_the_model_and_skipping_deletes_a_layer():
    layers = [torch.nn.Linear(4, 4) for _ in range(3)]
    x = torch.randn(5, 4)
    assert torch.equal(run_path(layers, x, path_of([1, 1, 1])), layers[2](layers[1](layers[0](x))))
    assert torch.equal(run_path(layers, x, path_of([1, 0, 2])), layers[2](layers[2](layers[0](x))))


def test_the_layer_runs_every_sequence_as_often_as_it_is_told():
    layer, x = DrLLM(16, 4).eval(), torch.randn(3, 7, 16)
    layer.counts = torch.tensor([0, 1, 2])
    y, routing = layer(x, context(3, 7))
    block = lambda h: h + layer.block(rms_norm(h, (16,)))[0]  # noqa: E731
    assert torch.equal(y[0], torch.zeros(7, 16))
    torch.testing.assert_close(x[1] + y[1], block(x[1]))
    torch.testing.assert_close(x[2] + y[2], block(block(x[2])))
    assert routing.counts_E().tolist() == [7, 7, 7]
    assert [r.counts_E().sum().item() for r in routing.passes] == [28, 14]
    layer.counts = None
    assert layer(x, context(3, 7))[1].experts_TK.unique().tolist() == [1], "untrained it is the base model"
    layer.counts = torch.ones(2)
    with pytest.raises(BadInput, match="3 sequences"):
        layer(x, context(3, 7))


def test_focal_loss_with_gamma_zero_is_cross_entropy_and_weights_follow_counts():
    logits, labels = torch.randn(20, 3), torch.randint(0, 3, (20,))
    torch.testing.assert_close(focal_loss(logits, labels, 0.0, torch.ones(3)), cross_entropy(logits, labels))
    assert focal_loss(logits, labels) < cross_entropy(logits, labels)
    weights = class_weights([4399, 120956, 1457])
    assert weights.sum().item() == pytest.approx(3) and weights[2] > weights[0] > weights[1]


def test_windows_of_short_and_long_prompts():
    router = DepthRouter(8)
    single = lambda x: router.last(torch.nn.functional.gelu(router.first(x), approximate="tanh"))  # noqa: E731
    x = torch.randn(1, 20, 8)
    real = torch.ones(1, 20, dtype=torch.bool)
    short = real.clone()
    short[:, 3:] = False
    torch.testing.assert_close(router(x, short)[0], single(x[0, :3]).mean(0))
    torch.testing.assert_close(router(x, real)[0], single(x[0, :16].view(8, 2, 8).mean(1)).mean(0))


def test_search_finds_a_better_path_evaluates_each_once_and_keeps_to_its_limits():
    asked = []

    def reward(path):
        asked.append(path)
        return float(2 not in path and path.count(1) == 1)

    path, got, evaluations = search_path(5, reward, simulations=300)
    assert got == 1 and 2 not in path
    assert len(asked) == len(set(asked)) == evaluations, "the cache prevents double evaluation"
    assert all(0 < len(p) <= 10 and max(p.count(l) for l in p) <= 2 for p in asked)
    path, got, _ = search_path(6, lambda p: float(0 in p), simulations=300)
    assert got == 1 and len(path) <= 4, "as good, and at least two layers shorter"
    assert search_path(3, lambda p: 0.0)[0] is None


def test_the_router_learns_from_labels():
    layer = DrLLM(8, 4)
    x = torch.randn(60, 5, 8)
    labels = torch.randint(0, 3, (60,))
    x[:, :, 0] += 3 * (labels - 1).unsqueeze(1)
    layer.counts = labels
    optimizer = torch.optim.AdamW(layer.depth.parameters(), lr=1e-2)
    weights = class_weights(torch.bincount(labels).tolist())
    for _ in range(60):
        routing = layer(x, context(60, 5, mode="train"))[1]
        focal_loss(routing.aux["depth_logits"], labels, weights=weights).backward()
        optimizer.step()
        optimizer.zero_grad()
    layer.counts = None
    chosen = layer(x, context(60, 5))[1].experts_TK.view(60, 5)[:, 0]
    assert (chosen == labels).float().mean() > 0.9
