"""Card: routing.md, "Improving Routing in SMoE with Graph of Tokens": the similarity-aware router."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.routing.similarity_aware import SimilarityAware
from moesaic.routing.topk import TopK


def ctx(*lengths, **kw):
    return RoutingContext(sequence_ids=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)), **kw)


def router(**options):
    built = SimilarityAware(16, 8, **options)
    with torch.no_grad():
        built.score.weight.mul_(50)
    return built


def test_a_is_the_formula():
    sim = router(earlier=False, tau=0.7)
    x = torch.randn(9, 16)
    a = (x @ sim.similarity_DD @ x.T / 0.7).softmax(-1)
    want = a @ (x @ sim.score.weight.T).softmax(-1)
    routing = sim(x, ctx(9))
    torch.testing.assert_close(routing.probs_TE, want)
    torch.testing.assert_close(routing.probs_TE.sum(1), torch.ones(9))
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.ones(9))
    torch.testing.assert_close(SimilarityAware(16, 8).similarity_DD, torch.eye(16) / 4)
    mixed = router(earlier=False, mix="logits")
    torch.testing.assert_close(
        mixed(x, ctx(9)).probs_TE, ((x @ mixed.similarity_DD @ x.T).softmax(-1) @ (x @ mixed.score.weight.T)).softmax(-1)
    )


def test_looking_only_at_oneself_is_the_base_router():
    sim, plain = router(earlier=False), TopK(16, 8, 2)
    with torch.no_grad():
        sim.similarity_DD.mul_(1e4)
        plain.score.weight.copy_(sim.score.weight)
    x = torch.nn.functional.normalize(torch.randn(20, 16), dim=1)
    a, b = sim(x, ctx(20)), plain(x, RoutingContext())
    assert torch.equal(a.experts_TK, b.experts_TK)
    torch.testing.assert_close(a.weights_TK, b.weights_TK)


def test_identical_tokens_keep_their_own_probabilities():
    routing = router()(torch.randn(1, 16).expand(7, -1), ctx(7))
    torch.testing.assert_close(routing.probs_TE, routing.logits_TE.softmax(-1))


def test_permutation_equivariant_without_order_and_causal_with_it():
    x, order = torch.randn(12, 16), torch.randperm(12)
    free, early = router(earlier=False), router()
    torch.testing.assert_close(free(x[order], ctx(12)).probs_TE, free(x, ctx(12)).probs_TE[order])
    later = x.clone()
    later[8:] += 3
    torch.testing.assert_close(early(later, ctx(12)).probs_TE[:8], early(x, ctx(12)).probs_TE[:8])
    assert not torch.allclose(free(later, ctx(12)).probs_TE[:8], free(x, ctx(12)).probs_TE[:8])
    assert early.causal and not free.causal


@pytest.mark.parametrize("earlier", [True, False])
def test_sequences_of_unequal_length_and_padding_stay_apart(earlier):
    sim, x = router(earlier=earlier), torch.randn(15, 16)
    both = sim(x, ctx(9, 6)).probs_TE
    torch.testing.assert_close(both[:9], sim(x[:9], ctx(9)).probs_TE)
    torch.testing.assert_close(both[9:], sim(x[9:], ctx(6)).probs_TE)
    mask = torch.arange(15) % 9 < 4
    masked = sim(x, ctx(9, 6, mask=mask))
    torch.testing.assert_close(masked.probs_TE[:4], sim(x[:4], ctx(4)).probs_TE)
    assert (masked.experts_TK[~mask] == -1).all() and masked.probs_TE.isfinite().all()


def test_a_sequence_without_its_beginning_is_refused():
    with pytest.raises(BadInput, match="without a cache"):
        router()(torch.randn(1, 16), ctx(1, positions=torch.tensor([5])))
    with pytest.raises(BadInput, match="tau=0"):
        SimilarityAware(16, 8, tau=0)
