"""What must hold of DERN (surgery-and-steering.md)."""

from __future__ import annotations

import pytest
import torch

from moesaic.core import registry
from moesaic.surgery import neurons
from moesaic.surgery.align import permuted
from moesaic.surgery.memory import measure, operate
from moesaic.view.block import View


def build(**options):
    return registry.get("prune", "dern").build(**options)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "NemotronH"])
def test_an_expert_is_the_rows_of_its_neurons(make, name):
    bank = View(make(name))[0].bank
    expert = bank[3].map(lambda tensor: tensor.float())
    again = neurons.from_rows(neurons.rows(expert), expert)
    assert set(again) == set(expert) and all(torch.equal(again[key], expert[key]) for key in expert)


def test_above_one_it_is_pruning_and_keeping_all_is_nothing(make, ids):
    layers = measure(make("Qwen3Moe"), ids, "R0")
    for layer in layers:
        change = build(keep=4, alpha=1.5).change(layer, None)
        assert not change.experts and change.matrix_RD is None
        scores = change.scores
        assert float(scores[list(change.keep)].min()) >= float(scores[[e for e in range(8) if e not in set(change.keep)]].max())
        assert list(build(keep=8).change(layer, None).keep) == list(range(8))


def test_neurons_go_where_their_likes_are(make, ids):
    """Expert 7 is a copy of a kept expert but for half of its neurons, which are another's; experts of random weights
    have nothing alike."""
    model = make("Qwen3Moe")
    block = View(model)[0]
    layer = measure(model, ids, "R0")[0]
    order = torch.argsort(layer.statistics["gate_sum"], descending=True).tolist()
    one, two, last = order[0], order[1], order[-1]
    mixed = block.bank[one]
    half = torch.arange(16) % 2 == 0
    for key in ("gate", "up"):
        mixed[key][half] = block.bank[two][key][half]
    mixed["down"][:, half] = block.bank[two]["down"][:, half]
    block.bank[last] = mixed
    before = {e: block.bank[e] for e in range(8)}
    rows = layer.rows_ED.clone()
    change = build(keep=7, alpha=0.9).change(layer, None)
    kept = list(change.keep)
    moved = change.report["moved"][last]
    assert sum(moved) == 16 and moved[kept.index(one)] == moved[kept.index(two)] == 8
    assert set(change.experts) == {kept.index(one), kept.index(two)}  # who received nothing stays byte for byte
    for e in (one, two):  # clusters of a neuron and its copy: the neuron itself
        new, old = neurons.rows(change.experts[kept.index(e)]), neurons.rows(before[e].map(lambda tensor: tensor.float()))
        torch.testing.assert_close(new[torch.argsort(new[:, 0])], old[torch.argsort(old[:, 0])], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(change.matrix_RD[kept.index(one)], rows[one] + 0.5 * rows[last])
    untouched = [f for f in range(7) if f not in change.experts]
    assert torch.equal(change.matrix_RD[untouched], rows[[kept[f] for f in untouched]])


def test_no_more_leaves_an_expert_than_it_has(make, ids):
    layer = measure(make("Mixtral"), ids, "R0")[1]
    change = build(keep=4, alpha=0.1).change(layer, None)
    moved = change.report["moved"]
    assert len(moved) == 4 and all(0 <= sum(counts) <= 16 for counts in moved.values()) and any(map(any, moved.values()))
    most = sum(layer.rows_ED[e].norm() for e in moved)
    assert float((change.matrix_RD - layer.rows_ED[list(change.keep)]).norm(dim=1).max()) <= float(most)
    loose = build(keep=4, alpha=-1.0, gate=False, normalise=True).change(layer, None)
    assert all(sum(counts) == 16 for counts in loose.report["moved"].values())
    assert all(expert["up"].shape == (16, 32) and expert["up"].isfinite().all() for expert in loose.experts.values())


def test_the_order_of_neurons_does_not_matter(make, ids, logits):
    first, second = make("Mixtral"), make("Mixtral")
    for block in View(second):
        for e in range(8):
            block.bank[e] = permuted(block.bank[e], torch.randperm(16, generator=torch.Generator().manual_seed(e)))
    changes = [operate(build(keep=4, alpha=0.2), measure(model, ids, "R0")) for model in (first, second)]
    assert any(change.experts for change in changes[0])
    torch.testing.assert_close(logits(first, ids), logits(second, ids), rtol=1e-3, atol=1e-4)


def test_neurons_weigh_as_much_as_the_expert_that_they_come_from(make, ids):
    """A neuron and a small, turned copy of it from a dropped expert: their mean by the importance of both experts."""
    model = make("Mixtral")
    layer = measure(model, ids, "R0")[0]
    order = torch.argsort(layer.statistics["gate_sum"], descending=True).tolist()
    kept, last = order[0], order[-1]
    own, noise = layer.expert(kept), layer.block.bank[last]
    near = {key: 0.2 * tensor + 0.01 * noise[key] for key, tensor in own.items()}
    layer.block.bank[last] = type(noise)(near)
    change = build(keep=7, alpha=0.9).change(layer, None)
    assert sum(change.report["moved"][last]) == change.report["moved"][last][list(change.keep).index(kept)] == 16
    weight = (layer.statistics["gate_sum"][[kept, last]] / float(layer.statistics["token_count"])).float()
    assert float(weight[0]) > 1.2 * float(weight[1]) > 0
    a, b = (neurons.rows(expert.map(lambda tensor: tensor.float())) for e in (kept, last) for expert in [layer.expert(e)])
    size = (a.norm(dim=1, keepdim=True) + b.norm(dim=1, keepdim=True)) / 2
    unit = torch.nn.functional.normalize
    want = unit(weight[0] * unit(a) + weight[1] * unit(b)) * size
    found = neurons.rows(change.experts[list(change.keep).index(kept)])
    torch.testing.assert_close(found[torch.argsort(found[:, 0])], want[torch.argsort(want[:, 0])], rtol=1e-4, atol=1e-6)


def test_clusters_keep_their_number_and_weights_count():
    torch.manual_seed(1)
    centres = torch.nn.functional.normalize(torch.randn(4, 24), dim=1)
    every = torch.cat([centres * 2, centres + 0.01 * torch.randn(4, 24), centres[:1] * 2])
    found = neurons.recombine(every, torch.ones(9), every.abs().amax(1), 4, 4)
    near = torch.nn.functional.normalize(found, dim=1) @ centres.T
    assert sorted(near.argmax(1).tolist()) == [0, 1, 2, 3] and float(near.max(1).values.min()) > 0.999
    two = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    heavy = neurons.recombine(two, torch.tensor([9.0, 1.0]), torch.ones(2), 1, 1)
    assert float(heavy[0, 0]) > 5 * float(heavy[0, 1]) and float(heavy.norm()) == pytest.approx(1.0)
    same = torch.ones(6, 3) * torch.arange(1, 7)[:, None]  # one direction: empty clusters take neurons of their own
    assert neurons.recombine(same, torch.ones(6), same[:, 0], 3, 3).isfinite().all()
