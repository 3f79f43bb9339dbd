"""Card: routing.md, "THOR": random experts and their agreement."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.layers.moe import MoE
from moesaic.routing.thor import Thor
from moesaic.training.consistency import symmetric_kl, two_forwards

TRAIN, EVAL = RoutingContext(mode="train"), RoutingContext()


def test_training_draws_one_expert_per_forward_uniformly():
    router, x = Thor(16, 4), torch.randn(7, 16)
    draws = [router(x, TRAIN).experts_TK for _ in range(400)]
    assert all((d == d[0, 0]).all() for d in draws)
    counts = torch.bincount(torch.stack([d[0, 0] for d in draws]), minlength=4)
    assert counts.min() > 70, "each expert gets 1/N of dense training"
    a, b = (router(x, RoutingContext(mode="train", generator=torch.Generator().manual_seed(3))) for _ in range(2))
    assert torch.equal(a.experts_TK, b.experts_TK)
    assert not list(router.parameters())


def test_evaluation_is_an_ensemble_or_a_draw_per_token_or_sentence():
    moe, x = MoE(16, 4, "thor").eval(), torch.randn(40, 16)
    each = [moe.bank(x, torch.tensor([0] * (e + 1) + [40] * (4 - e))) for e in range(4)]
    torch.testing.assert_close(moe(x)[0], sum(each) / 4, rtol=1e-4, atol=1e-5)
    assert len(Thor(16, 4, "token")(x, EVAL).experts_TK.unique()) == 4
    sentences = torch.arange(40) % 20  # as [time, batch] tensors lie: by sentence, not by time step
    drawn = Thor(16, 4, "sentence")(x, RoutingContext(sequence_ids=sentences)).experts_TK[:, 0]
    assert torch.equal(drawn[:20], drawn[20:]) and len(drawn.unique()) > 1
    with pytest.raises(BadInput, match="evaluation='mean'"):
        Thor(16, 4, "mean")


def test_symmetric_kl():
    a, b = 4 * torch.randn(2, 5, 9), 4 * torch.randn(2, 5, 9)
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    want = 0.5 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum())
    torch.testing.assert_close(symmetric_kl(a, b).double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(symmetric_kl(a, b), symmetric_kl(b, a))
    assert symmetric_kl(a, a) == 0
    assert symmetric_kl(100 * a.half(), 100 * b.half()).isfinite()
    mask = torch.rand(2, 5) < 0.5
    torch.testing.assert_close(symmetric_kl(a, b, mask), symmetric_kl(a[mask], b[mask]))


def test_two_forwards():
    moe, head = MoE(16, 4, "thor").train(), nn.Linear(16, 5)
    x, target = torch.randn(30, 16), torch.randint(0, 5, (30,))

    def forward():
        logits = head(moe(x)[0])
        return cross_entropy(logits, target), logits

    torch.manual_seed(1)
    parts = [forward() for _ in range(2)]
    for alpha in (0.0, 5.0):
        torch.manual_seed(1)
        loss, agreement = two_forwards(forward, alpha)
        torch.testing.assert_close(agreement, symmetric_kl(parts[0][1], parts[1][1]) / 30)
        torch.testing.assert_close(loss, parts[0][0] + parts[1][0] + alpha * agreement)
    alone = MoE(16, 1, "thor").train()
    assert two_forwards(lambda: (x.sum(), alone(x)[0]))[1] == 0, "equal draws without dropout agree"
    dropout = nn.Dropout(0.5)
    assert two_forwards(lambda: (x.sum(), dropout(alone(x)[0])))[1] > 0, "one expert with dropout is R-Drop"
