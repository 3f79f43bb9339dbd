"""Card: routing.md, "Union of Experts": what must hold of slices, data selection and selective attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.routing import Dispatch
from moesaic.experts.tensor_slices import TensorSlices
from moesaic.layers.attention import SelfAttention
from moesaic.layers.moe import MoE
from moesaic.layers.sequences import Sequences
from moesaic.layers.union_of_experts import SelectiveAttention, UoE
from moesaic.routing.union_of_experts import UnionOfExperts


def context(batch, length, **kw):
    sequence = torch.arange(batch).repeat_interleave(length)
    return RoutingContext(sequence_ids=sequence, positions=torch.arange(length).repeat(batch), carry={}, **kw)


def test_all_slices_at_weight_one_are_the_dense_mlp_biases_included():
    bank = TensorSlices(8, 4, 6, bias=True).double()
    w1, b1, w2, b2 = (torch.randn(*s, dtype=torch.float64) for s in ((24, 8), (24,), (8, 24), (8,)))
    bank.cut(w1, w2, b1, b2)
    x = torch.randn(7, 8, dtype=torch.float64)
    everywhere = Dispatch.of_slots(torch.arange(4).expand(7, 4), torch.ones(7, 4, dtype=torch.float64), 4)
    torch.testing.assert_close(bank.run(x, everywhere), gelu(x @ w1.T + b1) @ w2.T + b2, rtol=1e-12, atol=1e-12)
    even = UnionOfExperts(8, 4, k=4)
    with torch.no_grad():
        even.linear.weight.zero_()
    weights = even(x.float(), context(1, 7)).weights_TK
    torch.testing.assert_close(weights, torch.ones(7, 4))
    with pytest.raises(BadInput, match="bias=True"):
        TensorSlices(8, 4, 6).cut(w1, w2, b1, b2)
    with pytest.raises(BadInput, match="does not cut into 5 slices of 5"):
        TensorSlices(8, 5, 5).cut(w1, w2)


def test_every_head_at_weight_one_is_multi_head_attention():
    selective, dense = SelectiveAttention(16, 4, 4), SelfAttention(16, 4, rotary=True)
    with torch.no_grad():
        selective.router.linear.weight.zero_()
    dense.load_state_dict({k: v for k, v in selective.state_dict().items() if "router" not in k})
    x, ctx = torch.randn(2 * 9, 16), context(2, 9)
    at = Sequences(x, ctx)
    for causal in (True, False):
        want = at.flat(dense(at.pad(x), at.allowed(causal)))
        torch.testing.assert_close(selective(x, at, ctx, causal)[0], want)


def test_a_head_attends_over_its_own_tokens_at_their_places_in_the_subset():
    layer = SelectiveAttention(16, 4, 2)
    with torch.no_grad():
        layer.router.linear.weight.normal_()
    x, ctx = torch.randn(11, 16), context(1, 11)
    y, routing = layer(x, Sequences(x, ctx), ctx, True)
    from moesaic.layers.attention import rotate

    want = torch.zeros(11, 16)
    for h in range(4):
        mine = (routing.experts_TK == h).any(1).nonzero().squeeze(1)
        q, k, v = (part(x[mine])[:, 4 * h : 4 * h + 4] for part in (layer.query, layer.key, layer.value))
        q, k = (rotate(part.view(1, 1, -1, 4))[0, 0] for part in (q, k))
        scores = (q @ k.T / 2).masked_fill(~torch.ones(len(mine), len(mine), dtype=torch.bool).tril(), float("-inf"))
        weight = (routing.weights_TK * (routing.experts_TK == h)).sum(1)[mine]
        want[mine] += (weight[:, None] * (scores.softmax(-1) @ v)) @ layer.out.weight[:, 4 * h : 4 * h + 4].T
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)


def test_truncated_experts_take_exactly_l_tokens_and_losers_count_nothing():
    router, x, ctx = UnionOfExperts(16, 4, keep=0.5), torch.randn(2 * 10, 16), context(2, 10)
    with torch.no_grad():
        router.linear.weight.normal_()
    routing, plain = router(x, ctx), UnionOfExperts(16, 4)
    for row in (0, 1):
        of_row = routing.pairs.expert_S[(routing.pairs.token_S // 10) == row]
        assert torch.bincount(of_row, minlength=4).tolist() == [5] * 4
    plain.load_state_dict(router.state_dict())
    slots = plain(x, ctx)
    for t, e, w in zip(*routing.pairs, strict=True):
        won = (slots.experts_TK[t] == e).nonzero()
        torch.testing.assert_close(w, slots.weights_TK[t, won[0, 0]] if len(won) else torch.tensor(0.0))
    assert UnionOfExperts(16, 4).causal and not router.causal
    with pytest.raises(BadInput, match="not for a causal host"):
        MoE(16, 4, router, causal=True)
    full = UnionOfExperts(16, 4, keep=1.0)
    full.load_state_dict(router.state_dict())
    bank = TensorSlices(16, 4)
    torch.testing.assert_close(MoE(16, 4, full, bank)(x, ctx)[0], MoE(16, 4, plain, bank)(x, ctx)[0])


def test_samples_are_apart_and_a_sequence_picks_one_set_of_slices():
    router = UnionOfExperts(16, 4, keep=0.5)
    x, ctx = torch.randn(2 * 10, 16), context(2, 10)
    swapped = torch.cat([x[10:], x[:10]])
    bank = TensorSlices(16, 4)
    a, b = (MoE(16, 4, router, bank)(rows, ctx)[0] for rows in (x, swapped))
    torch.testing.assert_close(a, torch.cat([b[10:], b[:10]]))
    whole = UnionOfExperts(16, 4, selection="sequence", length=12)
    chosen = whole(x, ctx).experts_TK.view(2, 10, 2)
    assert torch.equal(chosen, chosen[:, :1].expand_as(chosen)) and not whole.causal
    with pytest.raises(BadInput, match="length=4"):
        UnionOfExperts(16, 4, selection="sequence", length=4)(x, ctx)
    with pytest.raises(BadInput, match="needs length"):
        UnionOfExperts(16, 4, selection="sequence")


def test_the_gate_learns_from_the_task_and_the_block_may_look_both_ways():
    layer = UoE(16, 4).train()
    y, routing = layer(torch.randn(2, 10, 16), context(2, 10, mode="train"))
    gates = [layer.attention.router.linear.weight, layer.ffn.router.linear.weight]
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(y.square().sum(), gates))
    assert [r.num_experts for r in routing.passes] == [4, 4]
    assert UoE(16, 4, keep=0.5, causal=False)(torch.randn(1, 10, 16), context(1, 10))[0].isfinite().all()
    with pytest.raises(BadInput, match="not for a causal host"):
        UoE(16, 4, keep=0.5)
