"""Card: routing.md, "MoEC": gate, dropout and loss."""

from __future__ import annotations

import pytest
import torch

from moesaic.balancing.balancer import Scope
from moesaic.balancing.moec import MoECLoad
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.core.routing import Routing
from moesaic.layers.moe import MoE
from moesaic.routing.expert_dropout import ExpertDropout
from moesaic.routing.moec import MoEC

EVAL = RoutingContext()


def train(step=0, layer=0):
    return RoutingContext(mode="train", step=step, layer=layer)


def test_the_gate_is_a_cosine_and_its_weight_a_sigmoid():
    router, x = MoEC(16, 8), torch.randn(30, 16)
    routing = router(x, EVAL)
    u = x @ router.reduce.weight.T
    cos = torch.nn.functional.cosine_similarity(u[:, None], router.expert_Er[None], dim=-1)
    torch.testing.assert_close(routing.logits_TE, cos)
    assert torch.equal(routing.experts_TK[:, 0], cos.argmax(1))
    torch.testing.assert_close(routing.weights_TK[:, 0], (cos.amax(1) / 0.07).sigmoid())
    torch.testing.assert_close(router(7 * x, EVAL).weights_TK, routing.weights_TK)
    with torch.no_grad():
        router.temperature.fill_(-5)
    assert router(x, EVAL).weights_TK.isfinite().all(), "a floor of 1e-4"


def test_survivors_by_cluster_interval_and_layer():
    drop = ExpertDropout(64, clusters=8, rate=0.5, interval=250)
    alive = drop.survivors_E(0)
    assert alive.view(8, 8).sum(1).tolist() == [4] * 8
    assert torch.equal(drop.survivors_E(249), alive), "the same for a whole interval"
    assert not torch.equal(drop.survivors_E(250), alive) and not torch.equal(drop.survivors_E(0, layer=1), alive)
    assert torch.equal(ExpertDropout(64, 8, 0.5, 250).survivors_E(250), drop.survivors_E(250)), "a resumed run draws the same"
    assert ExpertDropout(8, 4, rate=0.9).survivors_E(0).view(4, 2).sum(1).tolist() == [1] * 4, "at least one each"
    assert ExpertDropout(10, 2, rate=0.4).survivors_E(0).sum() == 6, "floor((1 - 0.4) * 5) = 3, whatever floats say"
    falling = ExpertDropout(8, 1, {"schedule": "linear", "start": 0.5, "end": 0.0, "steps": 1000}, interval=100)
    assert [int(falling.survivors_E(s).sum()) for s in (0, 500, 599, 1000)] == [4, 6, 6, 8]
    seen = torch.stack([drop.survivors_E(250 * i) for i in range(60)]).float().mean(0)
    assert seen.min() > 0.2 and seen.max() < 0.8, "every expert gets its turn"


def test_dropped_experts_get_no_token_and_no_gradient_and_return_in_evaluation():
    moe = MoE(16, 8, "moec", router_options={"clusters": 2, "rate": 0.5}, balance={"moec": 0.01}).train()
    dead = ~moe.router.dropout.survivors_E(0)
    y, routing = moe(torch.randn(200, 16), train())
    assert routing.counts_E()[dead].sum() == 0 and (routing.counts_E()[~dead] > 0).all()
    (y.sum() + sum(routing.aux[k] for k in routing.aux if k.startswith("loss/"))).backward()
    assert moe.bank.down_EDI.grad[dead].abs().sum() == 0
    assert moe.router.expert_Er.grad[dead].abs().sum() == 0 and moe.router.expert_Er.grad.isfinite().all()
    assert (moe.eval()(torch.randn(200, 16), EVAL)[1].counts_E()[dead] > 0).any()
    assert MoEC(16, 8, rate=0.0)(torch.randn(9, 16), RoutingContext(mode="train")).logits_TE.isfinite().all()
    with pytest.raises(MissingNeed, match="step"):
        MoE(16, 8, "moec", host=set())
    for options, says in (({"clusters": 3}, "does not divide"), ({"rate": 1.0}, "share"), ({"interval": 0}, "interval")):
        with pytest.raises(BadInput, match=says):
            MoEC(16, 8, **options)


def routed(m):
    """Tokens whose mean probabilities are m and who all chose expert 0."""
    p = torch.tensor([m])
    return Routing(p.log(), p, torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))


def spread(m, **options):
    """The variance term alone."""
    with_it = MoECLoad(clusters=2, **options).loss(routed(m), Scope())
    return ((with_it - MoECLoad(clusters=2, spread=0.0).loss(routed(m), Scope())) / len(m)).item()


def test_variance_is_inside_clusters():
    even = [0.4, 0.4, 0.1, 0.1]
    assert spread(even) == pytest.approx(0, abs=1e-6)
    assert spread(even, kind=0) == pytest.approx(torch.tensor(even).var().item(), abs=1e-6)
    odd = [0.5, 0.3, 0.15, 0.05]
    inside = (torch.tensor([0.5, 0.3]).var() + torch.tensor([0.15, 0.05]).var()).item() / 2
    assert spread(odd) == pytest.approx(inside, abs=1e-6)
    assert spread(odd, kind=2) == pytest.approx(inside / torch.tensor(0.4 - 0.1).exp().item(), abs=1e-6)
    assert spread([0.3, 0.5, 0.05, 0.15]) == pytest.approx(inside, abs=1e-6), "order inside a cluster does not matter"
    one, all_ = (MoECLoad(clusters=1, kind=kind).loss(routed(odd), Scope()) for kind in (1, 0))
    assert one == all_


def test_loss_by_hand_and_clusters_from_the_router():
    loss = MoECLoad(spread=0.0).loss(routed([0.5, 0.3, 0.15, 0.05]), Scope())
    assert loss.item() == pytest.approx(4 * (0.5 + 1e-6), rel=1e-5)
    assert MoECLoad().bind(MoEC(16, 64)).clusters == 8
    router = MoEC(16, 8, clusters=2)
    routing = router(torch.randn(40, 16), train())
    dropped = MoECLoad(clusters=2, spread=1.0).loss(routing, Scope())
    m = routing.probs_TE.mean(0)[routing.aux["survivors_E"]].view(2, 2)
    plain = MoECLoad(clusters=2, spread=0.0).loss(routing, Scope())
    torch.testing.assert_close(dropped - plain, 8 * m.var(1).mean())
    with pytest.raises(BadInput, match="clusters=3"):
        MoECLoad(clusters=3).loss(routing, Scope())
