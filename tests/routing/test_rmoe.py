"""Card: routing.md, "Layerwise Recurrent Router": what must hold."""

from __future__ import annotations

import torch

from moesaic.core.context import RoutingContext
from moesaic.models.reference import ReferenceLM
from moesaic.routing.rmoe import RMoE

CTX = RoutingContext(threads_state=True)


def test_without_memory_it_is_a_nonlinear_router_of_this_layer():
    router = RMoE(16, 8, rank=12)
    x = torch.randn(10, 16)
    assert torch.equal(router(x, CTX).logits_TE, router(x, CTX.replace(previous=torch.zeros(10, 12))).logits_TE)


def test_the_gru_is_the_card_formula():
    router = RMoE(16, 8, rank=12)
    x, h = torch.randn(10, 16), torch.randn(10, 12)
    u = x @ router.down.weight.T
    gates = u @ router.gru.weight_ih.T + router.gru.bias_ih
    state = h @ router.gru.weight_hh.T + router.gru.bias_hh
    (ur, uz, un), (hr, hz, hn) = gates.chunk(3, 1), state.chunk(3, 1)
    r, z = torch.sigmoid(ur + hr), torch.sigmoid(uz + hz)
    want = (1 - z) * torch.tanh(un + r * hn) + z * h
    routing = router(x, CTX.replace(previous=h))
    torch.testing.assert_close(routing.state, want)
    torch.testing.assert_close(routing.logits_TE, want @ router.up.weight.T)


def test_tokens_are_independent():
    router = RMoE(16, 8, rank=12)
    x, h = torch.randn(10, 16), torch.randn(10, 12)
    whole = router(x, CTX.replace(previous=h)).logits_TE
    torch.testing.assert_close(router(x[3:4], CTX.replace(previous=h[3:4])).logits_TE, whole[3:4])


def test_one_gru_for_all_layers_and_gradient_through_the_chain():
    model = ReferenceLM(layers=3, router="rmoe", dim=32, heads=2, experts=4, router_options={"rank": 8})
    routers = [block.moe.router for block in model.blocks]
    assert routers[0].gru is routers[2].gru
    _, routings = model(torch.randint(0, 256, (2, 12)))
    routings[-1].logits_TE.square().sum().backward()
    assert routers[0].down.weight.grad.abs().sum() > 0


def test_decoding_token_by_token_equals_prefill():
    model = ReferenceLM(layers=2, router="rmoe", dim=32, heads=2, experts=4, router_options={"rank": 8}).eval()
    ids = torch.randint(0, 256, (1, 9))
    whole = model.hidden(ids)[1]
    for n in range(1, 10):
        part = model.hidden(ids[:, :n])[1]
        for a, b in zip(part, whole, strict=True):
            torch.testing.assert_close(a.logits_TE[-1], b.logits_TE[n - 1], rtol=1e-4, atol=1e-5)
