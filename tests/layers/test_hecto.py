"""Card: routing.md, "Hecto": what must hold."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.layers.hecto import Hecto


def context(batch, length, **kw):
    return RoutingContext(sequence_ids=torch.arange(batch).repeat_interleave(length), **kw)


def forced(layer, e):
    """The layer with its gate pinned to expert e: the first token's first projected entry decides."""
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.project.bias[0] = 50.0
        layer.gate.weight[e, 0] = 50.0
    return layer


def test_order_matters_to_the_gru_alone():
    x = torch.randn(3, 9, 16)
    shuffled = torch.cat([x[:, :1], x[:, 1:][:, torch.randperm(8)]], 1)
    for e, same in ((0, True), (1, False)):
        layer = forced(Hecto(16, outputs=4), e).eval()
        (a, routing), (b, _) = (layer.pooled(rows, context(3, 9)) for rows in (x, shuffled))
        assert routing.experts_TK.unique().tolist() == [e]
        assert torch.allclose(a, b, atol=1e-6) == same


def test_a_forced_gate_is_that_expert_and_equal_experts_make_the_gate_irrelevant():
    x = torch.randn(3, 9, 16)
    layer = forced(Hecto(16, outputs=4), 1).eval()
    h = layer.project(x)
    torch.testing.assert_close(layer.pooled(x, context(3, 9))[0], layer.experts[1](h, torch.full((3,), 9)))
    twins = Hecto(16, outputs=4, kinds=("ffn",)).eval()
    twins.experts[1].load_state_dict(twins.experts[0].state_dict())
    a = twins.pooled(x, context(3, 9))[0]
    with torch.no_grad():
        twins.gate.weight.normal_()
    for mode in ("eval", "train"):
        torch.testing.assert_close(twins.pooled(x, context(3, 9, mode=mode))[0], a)


def test_padding_of_any_length_on_either_side_changes_nothing():
    layer = forced(Hecto(16, outputs=4), 1).eval()
    x = torch.randn(2, 6, 16)
    want = layer.pooled(x, context(2, 6))[0]
    for before, after in ((0, 5), (3, 2)):
        padded = torch.cat([torch.randn(2, before, 16), x, torch.randn(2, after, 16)], 1)
        mask = torch.zeros(2, 6 + before + after, dtype=torch.bool)
        mask[:, before : before + 6] = True
        got, routing = layer.pooled(padded, context(2, 6 + before + after, mask=mask.flatten()))
        torch.testing.assert_close(got, want)
        assert routing.counts_E().sum() == 12


def test_training_and_evaluation_give_the_same_output_and_the_gate_learns_from_the_task():
    layer, x = Hecto(16, outputs=4), torch.randn(5, 7, 16)
    (a, train), (b, _) = (layer.pooled(x, context(5, 7, mode=mode)) for mode in ("train", "eval"))
    torch.testing.assert_close(a, b)
    (grad,) = torch.autograd.grad(a.square().sum(), layer.gate.weight)
    assert grad.abs().sum() > 0
    p = train.probs_TE.view(5, 7, 2)[:, 0]
    torch.testing.assert_close(train.aux["loss/diversity"], 0.1 * p.mean(0).square().sum())
    torch.testing.assert_close(train.aux["loss/entropy"], -0.01 * (p * p.log()).sum(1).mean())


def test_the_diversity_term_rests_at_half_and_half():
    logits = torch.zeros(4, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(logits.softmax(-1).mean(0).square().sum(), logits)
    torch.testing.assert_close(grad, torch.zeros(4, 2))


def test_refusals():
    with pytest.raises(BadInput, match="causal"):
        Hecto(16, causal=True)
    with pytest.raises(BadInput, match=r"call pooled\(\)"):
        Hecto(16, outputs=4)(torch.randn(1, 3, 16), context(1, 3))
    with pytest.raises(BadInput, match="ffn or gru"):
        Hecto(16, kinds=("cnn",))
