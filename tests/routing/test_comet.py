"""Card: routing.md, "COMET": the tree gate, its permutations, and DSelect-k."""

from __future__ import annotations

import itertools

import pytest
import torch

from moesaic.balancing.balancer import Scope
from moesaic.balancing.comet import CometEntropy
from moesaic.balancing.dselect_k import DSelectKEntropy
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.layers.moe import MoE
from moesaic.routing.comet import Comet
from moesaic.routing.dselect_k import DSelectK, codes
from moesaic.routing.permutation import Permutation, doubly_stochastic, hungarian
from moesaic.routing.smooth_step import smooth_step

EVAL = RoutingContext()


def train(step=0):
    return RoutingContext(mode="train", step=step)


def naive_paths(gate, x):
    """Leaf probabilities by walking from every leaf up to the root."""
    n = gate.num_experts
    split = smooth_step(x @ gate.split_weight.T + gate.split_bias, gate.gamma).view(len(x), gate.k, n - 1)
    out = torch.ones(len(x), gate.k, n)
    for leaf in range(n):
        node = leaf + n - 1
        while node:
            parent, left = (node - 1) // 2, node % 2 == 1
            out[:, :, leaf] *= split[:, :, parent] if left else 1 - split[:, :, parent]
            node = parent
    return out


def saturate(gate):
    with torch.no_grad():
        weight, bias = (gate.split_weight, gate.split_bias) if isinstance(gate, Comet) else (gate.bit_weight, None)
        weight.mul_(1e5)
        if bias is not None:
            bias.zero_()
    return gate


def test_smooth_step_is_c1_and_exact_at_its_ends():
    t = torch.tensor([-9.0, -1.0, -0.5, 0.0, 0.5, 1.0, 9.0], dtype=torch.double, requires_grad=True)
    s = smooth_step(t, 2.0)
    assert s.tolist()[:2] == [0, 0] and s.tolist()[-2:] == [1, 1] and s[3] == 0.5
    (slope,) = torch.autograd.grad(s.sum(), t)
    assert slope[[0, 1, 5, 6]].abs().max() == 0, "value and slope match at both ends"
    assert slope[3] == pytest.approx(1.5 / 2)


@pytest.mark.parametrize("experts", [1, 2, 3, 5, 8, 13])
def test_paths_sum_to_one_for_any_number_of_leaves(experts):
    gate = Comet(16, experts, k=1, gamma=1.0, search=0)
    with torch.no_grad():
        gate.split_weight.mul_(10)
    x = torch.randn(30, 16)
    torch.testing.assert_close(gate.paths(x), naive_paths(gate, x))
    torch.testing.assert_close(gate.paths(x).sum(2), torch.ones(30, 1))


def test_weights_are_the_formula():
    gate = Comet(16, 6, k=3, search=0)
    x = torch.randn(20, 16)
    v = naive_paths(gate, x)
    mass = v * (x @ gate.leaf_weight.T + gate.leaf_bias).view(20, 3, 6).exp()
    want = (mass / mass.sum((1, 2), keepdim=True)).sum(1)
    routing = gate(x, EVAL)
    torch.testing.assert_close(routing.weights_TK, want)
    torch.testing.assert_close(routing.logits_TE.softmax(-1), want)


@pytest.mark.parametrize("build", [lambda k: Comet(16, 8, k, search=0), lambda k: DSelectK(16, 8, k)])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_saturated_gates_run_at_most_k_experts_and_weigh_one(build, k):
    routing = saturate(build(k))(torch.randn(50, 16), EVAL)
    active = (routing.experts_TK >= 0).sum(1)
    assert active.max() <= k and active.min() >= 1
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.ones(50))
    if k == 1:
        assert (routing.weights_TK.sum(1) == 1).all()
    w = routing.weights_TK.sum()
    assert w.isfinite() and routing.logits_TE.isfinite().all()


def test_gradients_are_finite_where_leaves_are_closed():
    gate = saturate(Comet(16, 8, 2, search=0))
    routing = gate(torch.randn(50, 16), train())
    loss = (routing.weights_TK * torch.randn(50, 8)).sum() + CometEntropy().loss(routing, Scope())
    for grad in torch.autograd.grad(loss, list(gate.parameters())):
        assert grad.isfinite().all()


def test_entropy_drives_the_gate_to_k_experts():
    for gate, loss in ((Comet(16, 8, 2, gamma=1.0, search=0), CometEntropy()), (DSelectK(16, 6, 2), DSelectKEntropy())):
        x = torch.randn(64, 16)
        optimizer = torch.optim.Adam(gate.parameters(), 0.02)
        before = (gate(x, EVAL).experts_TK >= 0).sum(1).float().mean()
        for _ in range(150):
            optimizer.zero_grad()
            loss.loss(gate(x, train()), Scope()).backward()
            optimizer.step()
        routing = gate(x, EVAL)
        assert before > 5
        assert (routing.experts_TK >= 0).sum(1).float().mean() < 2.3
        torch.testing.assert_close(routing.weights_TK.sum(1), torch.ones(64), atol=0.05, rtol=0)


def test_dselect_k_sums_to_one_for_powers_of_two_and_pays_for_the_rest():
    x = torch.randn(30, 16)
    torch.testing.assert_close(DSelectK(16, 8, 3)(x, EVAL).weights_TK.sum(1), torch.ones(30))
    routing = DSelectK(16, 5, 2)(x, train())
    assert (routing.weights_TK.sum(1) < 0.9).all()
    plain = DSelectKEntropy().loss(routing, Scope())
    assert plain > CometEntropy().loss(routing, Scope()) + 2
    fixed = DSelectK(16, 8, 2, per_example=False)(x, EVAL)
    assert (fixed.weights_TK == fixed.weights_TK[:1]).all()


def test_hungarian_and_sinkhorn_agree_with_brute_force():
    for size in (1, 2, 4, 5):
        cost = torch.randn(size, size)
        rows = torch.arange(size)
        best = min(itertools.permutations(range(size)), key=lambda p: cost[rows, list(p)].sum().item())
        assert hungarian(cost).tolist() == list(best)
        soft = doubly_stochastic(-cost.double()[None] / 0.003, 3000)[0]
        assert soft.argmax(1).tolist() == list(best)


def test_permutation_search_ends_once_in_a_hard_assignment_that_is_saved():
    gate = Comet(16, 6, 2, search=10)
    x = torch.randn(20, 16)
    soft = gate(x, train(3))
    assert soft.aux["permutation_entropy"].requires_grad
    torch.testing.assert_close(soft.weights_TK.sum(1), torch.ones(20))
    want = hungarian(-gate.permutation.theta_REE[0])
    after = gate(x, train(10))
    assert "permutation_entropy" not in after.aux
    assert torch.equal(gate.permutation.fixed_REE[0].argmax(1), want.long())
    fixed = gate.permutation.fixed_REE.clone()
    with torch.no_grad():
        gate.permutation.theta_REE.normal_()
    assert torch.equal(gate(x, train(11)).weights_TK, after.weights_TK), "frozen"
    assert torch.equal(gate.permutation.fixed_REE, fixed)
    other = Comet(16, 6, 2, search=10)
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other(x, EVAL).weights_TK, after.weights_TK)
    plain = Comet(16, 6, 2, search=0)
    plain.load_state_dict({k: v for k, v in gate.state_dict().items() if not k.startswith("permutation")})
    torch.testing.assert_close(plain(x, EVAL).weights_TK[:, want.argsort()], after.weights_TK)


def test_the_identity_permutation_changes_nothing_and_evaluation_rounds_nothing():
    gate = Comet(16, 6, 2, search=10, permute_each=True)
    gate.permutation.fixed_REE.copy_(torch.eye(6).expand(2, -1, -1))
    gate.permutation.is_fixed.fill_(True)
    plain = Comet(16, 6, 2, search=0)
    plain.load_state_dict({k: v for k, v in gate.state_dict().items() if not k.startswith("permutation")})
    x = torch.randn(20, 16)
    torch.testing.assert_close(gate(x, EVAL).weights_TK, plain(x, EVAL).weights_TK)
    fresh = Permutation(6, 1, 10)
    fresh(train(9))
    fresh(RoutingContext(step=500))
    assert not fresh.is_fixed and int(fresh.tau.step) == 9


def test_a_recomputed_forward_sees_the_same_permutation():
    from torch.utils.checkpoint import checkpoint

    moe = MoE(16, 6, "comet", router_options={"search": 2}).train()
    twin = MoE(16, 6, "comet", router_options={"search": 2}).train()
    twin.load_state_dict(moe.state_dict())
    for step in range(4):
        x = torch.randn(20, 16, requires_grad=True)
        checkpoint(moe, x, train(step), use_reentrant=False)[0].square().sum().backward()
        twin(x, train(step))[0].square().sum().backward()
    assert moe.router.permutation.is_fixed
    for (key, a), (_, b) in zip(moe.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=key)


def test_what_cannot_be_is_refused():
    with pytest.raises(BadInput, match="gamma=0"):
        Comet(16, 4, gamma=0)
    with pytest.raises(BadInput, match="k=0"):
        DSelectK(16, 4, 0)
    with pytest.raises(MissingNeed, match="step"):
        MoE(16, 4, "comet", host=set())
    assert MoE(16, 4, "comet", host=set(), router_options={"search": 0})


@pytest.mark.parametrize("bits", [1, 3, 6])
def test_codes_by_doubling_equal_the_product_over_bits(bits):
    """Twin: each code's product over its bits, written out; values and gradients, saturated bits included."""
    on_TKm = torch.rand(5, 2, bits, dtype=torch.double)
    on_TKm[0, 0, 0], on_TKm[1, 1, -1] = 0.0, 1.0
    on_TKm.requires_grad_()
    code_Em = (torch.arange(2**bits).unsqueeze(1) >> torch.arange(bits) & 1).bool()
    want = torch.where(code_Em, on_TKm.unsqueeze(2), 1 - on_TKm.unsqueeze(2)).prod(-1)
    got = codes(on_TKm)
    torch.testing.assert_close(got, want)
    cotangent = torch.randn_like(want)
    torch.testing.assert_close(*(torch.autograd.grad(y, on_TKm, cotangent)[0] for y in (got, want)))


@pytest.mark.parametrize("experts", [1, 2, 3, 5, 8, 13])
def test_paths_equal_a_walk_down_each_heap(experts):
    """Twin: leaf by leaf, the product of its turns on the way up to the root."""
    router = Comet(6, experts, k=1, search=0)
    x_TD = torch.randn(4, 6)
    with torch.no_grad():
        router.split_weight.mul_(100)
        left_Ts = smooth_step(x_TD @ router.split_weight.T + router.split_bias, router.gamma)
        got = router.paths(x_TD)[:, 0]
    for leaf in range(experts):
        node, want_T = leaf + experts - 1, torch.ones(4)
        while node:
            above = (node - 1) // 2
            want_T = want_T * (left_Ts[:, above] if node % 2 else 1 - left_Ts[:, above])
            node = above
        torch.testing.assert_close(got[:, leaf], want_T)


def test_one_permutation_for_all_trees_mixes_their_sum():
    router = Comet(6, 5, k=3, search=10)
    ctx = RoutingContext(mode="train", step=2)
    x_TD = torch.randn(7, 6)
    fast = router(x_TD, ctx)
    permutation_REE = router.permutation(ctx).expand(3, -1, -1)
    router.permutation.forward = lambda ctx: permutation_REE  # the twin: tree by tree
    torch.testing.assert_close(fast.probs_TE, router(x_TD, ctx).probs_TE)
