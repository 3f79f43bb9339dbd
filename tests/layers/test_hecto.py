"""Card: routing.md, "Hecto": what must hold."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.layers.hecto import Hecto, SequenceGRU


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


SYMBOLS, LENGTH, DIM = 10, 12, 16


def mixed(count, random, table):
    """Sequences [count, 1 + LENGTH, DIM], labels and kinds: kind 0 turns on the order of symbols 0 and 1, kind 1 on whether 2
    or 3 is the more frequent. The first vector, an encoder's [CLS], is the mean of the others and a mark of the kind."""
    kind, label = (torch.randint(0, 2, (count,), generator=random) for _ in range(2))
    ids = torch.randint(4, SYMBOLS, (count, LENGTH), generator=random)
    few, more = (torch.randint(1, high, (count,), generator=random) for high in (3, 4))
    for i in range(count):
        at = torch.randperm(LENGTH, generator=random)
        if kind[i] == 0:
            ids[i, at[:2].sort().values] = torch.tensor([0, 1] if label[i] else [1, 0])
        else:
            often, seldom = (2, 3) if label[i] else (3, 2)
            ids[i, at[: few[i]]] = seldom
            ids[i, at[few[i] : 2 * few[i] + more[i]]] = often
    x = table[ids]
    return torch.cat([(3 * x.mean(1) + table[SYMBOLS + kind])[:, None], x], 1), label, kind


def trained(kinds, seed, steps=400):
    """Accuracy on either kind, the share of either that goes to a GRU, and multiply-adds of the experts per sequence."""
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    table = torch.randn(SYMBOLS + 2, DIM, generator=random)
    layer = Hecto(DIM, 2, outputs=2, width=32, project=32, kinds=kinds)
    optimiser = torch.optim.Adam(layer.parameters(), lr=5e-3)
    for _ in range(steps):
        x, label, _ = mixed(64, random, table)
        y, routing = layer.pooled(x, context(64, 1 + LENGTH, mode="train"))
        loss = torch.nn.functional.cross_entropy(y, label) + routing.aux["loss/entropy"] + routing.aux["loss/diversity"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, label, kind = mixed(1000, random, table)
    with torch.no_grad():
        y, routing = layer.eval().pooled(x, context(1000, 1 + LENGTH))
    chosen = routing.experts_TK[:: 1 + LENGTH, 0]
    gru = torch.tensor([isinstance(expert, SequenceGRU) for expert in layer.experts])[chosen].float()
    right = (y.argmax(-1) == label).float()
    cost = gru * (1 + LENGTH) * 6 * 32 * 32 + (1 - gru) * 32 * 32
    return [float(part[kind == k].mean()) for part in (right, gru) for k in (0, 1)] + [float(cost.mean())]


@pytest.mark.slow
def test_a_mixed_pair_beats_two_ffns_and_costs_less_than_two_grus():
    order, counts, to_gru, _, cost = trained(("ffn", "gru"), 1)
    assert min(order, counts) > 0.97 and to_gru > 0.9
    ffn_order, ffn_counts, *_, ffn_cost = trained(("ffn",), 1)
    assert ffn_order < 0.65 and ffn_counts > 0.97, "order is not in the first vector"
    gru_order, gru_counts, *_, gru_cost = trained(("gru",), 1)
    assert min(gru_order, gru_counts) > 0.97
    assert ffn_cost < cost < 0.8 * gru_cost
