"""Card: routing.md, "Improving Routing in SMoE with Graph of Tokens" (attention-aware half): what must hold."""

from __future__ import annotations

import torch

from moesaic.core.context import RoutingContext
from moesaic.models.language.attention import Look, MixByAttention
from moesaic.models.reference import ReferenceLM
from moesaic.routing.attention_aware import AttentionAware
from moesaic.routing.topk import TopK


class Fixed:
    def __init__(self, a):
        self.a = a

    def mix(self, values):
        return self.a @ values


def test_identity_attention_is_the_base_router():
    router, base = AttentionAware(16, 8), TopK(16, 8)
    base.score.weight.data.copy_(router.score.weight.data)
    x = torch.randn(20, 16)
    a, b = router(x, RoutingContext(attention=Fixed(torch.eye(20)))), base(x, RoutingContext())
    assert torch.equal(a.experts_TK, b.experts_TK)
    torch.testing.assert_close(a.weights_TK, b.weights_TK)


def test_rows_stay_distributions_and_equal_tokens_keep_theirs():
    router = AttentionAware(16, 8)
    attention = Fixed(torch.randn(20, 20).softmax(-1))
    x = torch.randn(20, 16)
    torch.testing.assert_close(router(x, RoutingContext(attention=attention)).probs_TE.sum(1), torch.ones(20))
    same = x[:1].expand(20, -1)
    routing = router(same, RoutingContext(attention=attention))
    torch.testing.assert_close(routing.probs_TE, routing.logits_TE.softmax(-1))


def test_permutation_equivariance():
    router = AttentionAware(16, 8)
    a, x, order = torch.randn(20, 20).softmax(-1), torch.randn(20, 16), torch.randperm(20)
    whole = router(x, RoutingContext(attention=Fixed(a))).probs_TE
    mixed = router(x[order], RoutingContext(attention=Fixed(a[order][:, order]))).probs_TE
    torch.testing.assert_close(mixed, whole[order])


def test_running_attention_with_other_values_equals_the_matrix_product():
    batch, heads, length = 2, 4, 9
    q, k = torch.randn(2, batch, heads, length, 8)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[1, 6:] = False
    mix = MixByAttention(q, k, Look.of(True, mask, length, 0, q.device))
    values = torch.randn(batch * length, 5)
    want = mix.probs().mean(1) @ values.view(batch, length, 5)
    torch.testing.assert_close(mix.mix(values).view(batch, length, 5), want, rtol=1e-4, atol=1e-5)


def test_causal_host_keeps_the_past():
    model = ReferenceLM(router="attention_aware", dim=32, heads=2, experts=4).eval()
    ids = torch.randint(0, 256, (1, 12))
    later = ids.clone()
    later[0, 8] = (later[0, 8] + 1) % 256
    for a, b in zip(model.hidden(ids)[1], model.hidden(later)[1], strict=True):
        torch.testing.assert_close(a.probs_TE[:8], b.probs_TE[:8])
        assert not torch.equal(a.probs_TE[8:], b.probs_TE[8:])
