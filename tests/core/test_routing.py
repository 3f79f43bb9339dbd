from __future__ import annotations

import torch

from moesaic.core.routing import Dispatch, Pairs, Routing


def make(experts_TK, experts, **kw):
    experts_TK = torch.tensor(experts_TK)
    logits = torch.zeros(experts_TK.shape[0], experts)
    weights = torch.rand(experts_TK.shape).masked_fill(experts_TK < 0, 0)
    return Routing(logits, experts_TK=experts_TK, weights_TK=weights, **kw)


def test_dispatch_sorts_pairs_and_forgets_empty_slots():
    routing = make([[2, 0], [-1, 2], [0, -1]], 4)
    dispatch = Dispatch.of(routing)
    assert dispatch.token_S.tolist() == [0, 2, 0, 1]
    assert dispatch.offsets_E1.tolist() == [0, 2, 2, 4, 4]
    assert dispatch.expert_S.tolist() == [0, 0, 2, 2]
    w = routing.weights_TK
    assert torch.equal(dispatch.weight_S, torch.stack([w[0, 1], w[2, 0], w[0, 0], w[1, 1]]))


def test_dispatch_of_pairs_and_shared_experts():
    pairs = Pairs(torch.tensor([1, 0, 1]), torch.tensor([2, 1, 0]), torch.tensor([0.1, 0.2, 0.3]))
    routing = Routing(torch.zeros(2, 3), pairs=pairs)
    dispatch = Dispatch.of(routing, row_to_expert=torch.tensor([1, 0, 1]), num_stored=2)
    assert dispatch.offsets_E1.tolist() == [0, 1, 3]
    assert dispatch.token_S.tolist() == [0, 1, 1]
    assert routing.counts_E().tolist() == [1, 1, 1]


def test_slots_outside_the_bank_are_empty():
    dispatch = Dispatch.of_slots(torch.tensor([[0, 5], [-1, 1]]), torch.ones(2, 2), 2)
    assert dispatch.offsets_E1.tolist() == [0, 1, 2]


def test_counts_come_before_dropping_and_skip_padding():
    routing = make([[0, -1], [1, 1]], 2, selected_TK=torch.tensor([[0, 1], [1, 1]]))
    assert routing.counts_E().tolist() == [1, 3]
    assert routing.counts_E(torch.tensor([True, False])).tolist() == [1, 1]


def test_nothing_routed():
    dispatch = Dispatch.of(make([[-1], [-1]], 3))
    assert dispatch.offsets_E1.tolist() == [0, 0, 0, 0]
    assert dispatch.combine(torch.zeros(0, 5)).tolist() == torch.zeros(2, 5).tolist()
