"""Card: layers-and-balancing.md, "ModuleFormer": what must hold of gates, attention modules and losses."""

from __future__ import annotations

import math

import pytest
import torch

from moesaic.balancing.balancer import Scope
from moesaic.balancing.concentration import Concentration
from moesaic.balancing.mutual_information import MutualInformation
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.routing import Routing
from moesaic.layers.module_former import ModularAttention, ModuleFormer
from moesaic.layers.stick_breaking import stick_weights
from moesaic.routing.module_former import ModuleGate

CAUSAL = torch.ones(12, 12, dtype=torch.bool).tril()


def direct(logits, allowed):
    """The product itself, key by key."""
    z, n = torch.where(allowed, logits.sigmoid(), 0.0), logits.shape[-1]
    rows = [[z[i, j] * torch.prod(1 - z[i, j + 1 : i + 1]) if j <= i else z[0, 0] * 0 for j in range(n)] for i in range(n)]
    return torch.stack([torch.stack(row) for row in rows])


def test_log_space_equals_the_direct_product_and_its_gradient():
    logits = (3 * torch.randn(12, 12, dtype=torch.float64)).requires_grad_()
    allowed = CAUSAL.clone()
    allowed[:, 4] = False
    got, want = stick_weights(logits, allowed), direct(logits, allowed)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-12)
    seed = torch.randn_like(want)
    torch.testing.assert_close(*(torch.autograd.grad(y, logits, seed)[0] for y in (got, want)))


def test_a_row_sums_to_what_was_broken_off():
    logits = torch.randn(12, 12)
    z = torch.where(CAUSAL, logits.sigmoid(), 0.0)
    total = stick_weights(logits, CAUSAL).sum(-1)
    torch.testing.assert_close(total, 1 - (1 - z).prod(-1))
    assert (total < 1).all()


def test_a_query_that_breaks_all_at_itself_attends_only_to_itself():
    logits = torch.randn(12, 12)
    logits.fill_diagonal_(60.0)
    torch.testing.assert_close(stick_weights(logits, CAUSAL), torch.eye(12))


def attention(k=2, **options):
    gate = ModuleGate(16, 4, k, drop=0.0, **options)
    return ModularAttention(16, gate, heads=2, width=8, balance={}).eval()


def test_equal_modules_with_renormalised_weights_are_one_dense_attention():
    layer = attention(renormalised=True)
    with torch.no_grad():
        for p in layer.modules_E.parameters():
            p.copy_(p[:1].expand_as(p))
    x = torch.randn(1, 12, 16)
    q = x[0] @ layer.modules_E.query_ECD[0].T
    heads = []
    for part in (slice(0, 8), slice(8, 16)):
        logits = q[:, part] @ layer.key(x)[0][:, part].T / 8**0.5
        heads.append(direct(logits, CAUSAL) @ layer.value(x)[0][:, part])
    want = torch.cat(heads, 1) @ layer.modules_E.out_EDC[0].T
    torch.testing.assert_close(layer(x)[0][0], want, rtol=1e-4, atol=1e-5)


def test_map_and_reduce_equal_one_slot_at_a_time_also_with_empty_slots():
    layer, x = attention(), torch.randn(9, 16)
    routing = layer.router(x, RoutingContext(mask=torch.arange(9) != 4))
    modules = layer.modules_E
    query = modules.map(x, routing)
    y = torch.randn(9, 2, 16)
    want = torch.zeros(9, 16)
    for t, s in torch.nonzero(routing.experts_TK >= 0).tolist():
        e = routing.experts_TK[t, s]
        torch.testing.assert_close(query[t, s], modules.query_ECD[e] @ x[t])
        want[t] += routing.weights_TK[t, s] * (modules.out_EDC[e] @ y[t, s])
    assert torch.equal(query[4], torch.zeros(2, 16))
    torch.testing.assert_close(modules.reduce(y, routing), want)
    assert modules.cost_E.tolist() == [4 * 16 * 16] * 4
    assert modules.bytes_E.sum() == sum(4 * p.numel() for p in modules.parameters())


def test_removing_a_module_that_nobody_chose_changes_only_the_softmax():
    gate = ModuleGate(16, 5, gate="linear")
    x = torch.randn(20, 16)
    with torch.no_grad():
        gate.last.weight[4] = 0
        x[:, 0], gate.last.weight[4, 0] = 1.0, -1e9  # a gate row at minus infinity
    smaller = ModuleGate(16, 4, gate="linear")
    smaller.last.weight.data.copy_(gate.last.weight[:4])
    a, b = gate(x, RoutingContext()), smaller(x, RoutingContext())
    assert torch.equal(a.experts_TK, b.experts_TK)
    torch.testing.assert_close(a.weights_TK, b.weights_TK)


def test_gates_full_softmax_and_sampled_choices():
    x = torch.randn(400, 16)
    for gate in ("mlp", "linear", "cosine"):
        router = ModuleGate(16, 8, gate=gate)
        routing = router(x, RoutingContext())
        torch.testing.assert_close(routing.weights_TK, routing.probs_TE.gather(1, routing.experts_TK))
        assert (routing.weights_TK.sum(1) < 1).all()
    sampled = ModuleGate(16, 8, gate="linear", sample=1)
    train, plain = (sampled(x, RoutingContext(mode=mode)).experts_TK for mode in ("train", "eval"))
    assert torch.equal(train[:, 0], plain[:, 0]) and (train[:, 1] != train[:, 0]).all()
    assert len(train[:, 1].unique()) == 8 and not torch.equal(train, plain)
    with pytest.raises(BadInput, match="sample=3"):
        ModuleGate(16, 8, sample=3)


def test_mutual_information_and_concentration_know_their_ends():
    def loss(balancer, p):
        return balancer.loss(Routing(p.clamp(min=1e-9).log(), p), Scope()).item()

    one_hot, uniform = torch.eye(8).repeat(3, 1), torch.full((24, 8), 1 / 8)
    constant = torch.randn(1, 8).softmax(-1).expand(24, 8)
    assert loss(MutualInformation(), one_hot) == pytest.approx(-math.log(8))
    assert loss(MutualInformation(), uniform) == pytest.approx(0, abs=1e-6)
    assert loss(MutualInformation(), constant) == pytest.approx(0, abs=1e-6)
    assert loss(Concentration(), uniform) == pytest.approx(math.log(8))
    one = torch.eye(8)[:1].expand(24, 8)
    assert loss(Concentration(), one) == pytest.approx(0, abs=1e-6)
    assert Concentration.removable(Routing(one.log(), one), Scope()).tolist() == [False] + [True] * 7


def test_both_routings_are_shown_and_both_losses_counted():
    layer = ModuleFormer(16, 8, mi=1.0).train()
    routing = layer(torch.randn(2, 12, 16), RoutingContext(mode="train"))[1]
    want = sum(r.aux["loss/mutual_information"] for r in routing.passes)
    torch.testing.assert_close(routing.aux["loss/mutual_information"], want)
    assert layer.attends and layer.own_norm and layer.no_cache
