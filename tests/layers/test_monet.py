"""Card: layers-and-balancing.md, "Monet": what must hold."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from moesaic.balancing.balancer import Scope
from moesaic.balancing.uniformity import Uniformity
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.routing import Routing
from moesaic.experts.monet import Monet as Bank
from moesaic.layers.moe import MoE
from moesaic.layers.monet import Monet
from moesaic.routing.keyed import KeyedRouter

CTX = RoutingContext(carry={})


def bank_of(kind, n=5, dim=8):
    bank = Bank(dim, n * n, 6, kind).double()
    for p in bank.parameters():
        torch.nn.init.normal_(p)
    return bank


def explicit(bank, x, gates, left_out=()):
    weight_TE = torch.einsum("thi,thj->tij", gates[:, 0], gates[:, 1]).flatten(1)
    return sum(weight_TE[:, e : e + 1] * bank.expert(e, x) for e in range(len(bank)) if e not in left_out)


@pytest.mark.parametrize("kind", ["horizontal", "vertical"])
@pytest.mark.parametrize("normalised", [True, False])
def test_the_factorised_sum_equals_the_sum_over_all_experts(kind, normalised):
    bank, x = bank_of(kind), torch.randn(7, 8, dtype=torch.float64)
    gates = torch.rand(7, 2, 3, 5, dtype=torch.float64)
    gates = gates / gates.sum(-1, keepdim=True) if normalised else gates
    torch.testing.assert_close(bank.run_keyed(x, gates), explicit(bank, x, gates), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["horizontal", "vertical"])
def test_masking_an_expert_is_exact_and_masking_a_half_is_a_zero(kind):
    bank, x = bank_of(kind), torch.randn(4, 8, dtype=torch.float64)
    gates = torch.rand(4, 2, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(bank.without(x, gates, [3, 11]), explicit(bank, x, gates, {3, 11}))
    zeroed = gates.clone()
    zeroed[:, 0, :, 2] = 0
    torch.testing.assert_close(bank.run_keyed(x, zeroed), explicit(bank, x, gates, set(range(10, 15))))


def test_the_threshold_keeps_about_k_and_at_least_one_key_per_head():
    router = KeyedRouter(64, 512, heads=4, k=32)
    assert router.threshold == pytest.approx(1.5341, abs=1e-4)
    x = torch.randn(400, 64)
    kept = (router(x, RoutingContext(mode="train")).keyed_T2HN > 0).sum(-1).float()
    assert kept.mean() == pytest.approx(32, rel=0.05)
    with torch.no_grad():
        router.mean_2H.fill_(100.0)  # evaluation's statistics say that every logit is far below
    gates = router(x, CTX).keyed_T2HN
    assert torch.equal((gates > 0).sum(-1), torch.ones(400, 2, 4, dtype=torch.long))
    torch.testing.assert_close(gates.sum(-1), torch.ones(400, 2, 4))


def test_gates_are_a_softmax_of_raw_logits_over_what_was_kept():
    router = KeyedRouter(16, 32, heads=2, k=4)
    with torch.no_grad():
        router.weight_2HND.mul_(50)
    routing = router(torch.randn(9, 16), RoutingContext(mode="train"))
    raw, gates = routing.logits_TE.view(9, 2, 2, 32), routing.keyed_T2HN
    z = (raw - raw.mean((0, 3), keepdim=True)) / (raw.var((0, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    keep = z >= z.amax(-1, keepdim=True).clamp(max=router.threshold)
    torch.testing.assert_close(gates, raw.exp() * keep / (raw.exp() * keep).sum(-1, keepdim=True))
    torch.testing.assert_close(routing.counts_E(), (gates > 0).flatten(1).sum(0).float())


def test_statistics_move_in_training_once_without_padding_and_rest_in_evaluation():
    router, other = (KeyedRouter(16, 8, heads=2) for _ in range(2))
    other.load_state_dict(router.state_dict())
    x = torch.randn(30, 16)
    mask = torch.arange(30) < 20
    router(x, RoutingContext(mode="train", mask=mask))
    other(x[:20], RoutingContext(mode="train"))
    torch.testing.assert_close(router.var_2H, other.var_2H)
    assert not torch.equal(router.var_2H, torch.ones(2, 2))
    before = router.var_2H.clone()
    router(x, RoutingContext(mode="eval"))
    assert torch.equal(before, router.var_2H)
    assert {"mean_2H", "var_2H"} < set(router.state_dict())
    layer = Monet(16, 16, heads=2).train()
    y = torch.utils.checkpoint.checkpoint(
        lambda x: layer(x, RoutingContext(mode="train", carry={}))[0], x.requires_grad_(), use_reentrant=False
    )
    after = layer.router.var_2H.clone()
    y.sum().backward()
    assert torch.equal(after, layer.router.var_2H), "recomputation must not count twice"


def test_uniformity_is_bounded_by_ln_n_and_reaches_it_for_an_even_mean():
    even = torch.eye(6).view(6, 1, 1, 6).expand(6, 2, 3, 6)
    loss = Uniformity().loss(Routing(even.flatten(1), keyed_T2HN=even), Scope())
    assert loss.item() == pytest.approx(math.log(6))
    skewed = torch.rand(50, 2, 3, 6).softmax(-1) * torch.tensor([3.0, 1, 1, 1, 1, 1])
    skewed = skewed / skewed.sum(-1, keepdim=True)
    assert Uniformity().loss(Routing(skewed.flatten(1), keyed_T2HN=skewed), Scope()) > math.log(6)


def test_layers_of_a_group_reuse_the_gates_of_their_first():
    first, later = Monet(16, 16, heads=2), Monet(16, 16, heads=2, first=False)
    assert not any("router" in name for name, _ in later.named_parameters())
    x = torch.randn(5, 16)
    _, routing = first.train()(x, RoutingContext(mode="train", carry={}))
    assert set(routing.aux) == {"loss/uniformity", "loss/ambiguity"}
    y, again = later(x, RoutingContext(mode="train", carry=routing.carry))
    torch.testing.assert_close(y, later.bank.run_keyed(x, routing.keyed_T2HN))
    assert not again.aux, "a group's losses count once"
    (grad,) = torch.autograd.grad(y.sum(), first.router.weight_2HND)
    assert grad.abs().sum() > 0
    with pytest.raises(BadInput, match="none gave any"):
        later(x, CTX)


PROBE = """
import resource, torch
torch.set_num_threads(1)
from moesaic.core.context import RoutingContext
from moesaic.layers.monet import Monet
layer = Monet(64, 262144, heads=4).train()
assert len(layer.bank) == 512 * 512
x = torch.randn(256, 64, requires_grad=True)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
y, routing = layer(x, RoutingContext(mode="train", carry={}))
(y.square().mean() + sum(routing.aux.values())).backward()
print(peak() - before)
"""


def test_262144_experts_run_in_bounded_memory():
    """Forward and backward of 256 tokens; one weight per token and expert alone would be 256 MB, its gradient as much."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200


def test_refusals():
    with pytest.raises(BadInput, match="experts=500"):
        Monet(16, 500)
    with pytest.raises(BadInput, match="dim=15"):
        Bank(15, 16)
    with pytest.raises(BadInput, match="two keyed halves"):
        MoE(16, 16, "topk", "monet", router_options={"k": 2})
