"""Draws by value: what each option leaves in, and how often what is left comes out."""

from __future__ import annotations

import pytest
import torch

from moesaic.serving.http import sampling
from moesaic.serving.http.sampling import Options, Sampler

LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]))


def drawn(count=4000, logits=LOGITS, **fields):
    """Share of each token in draws that each see no earlier ones."""
    sampler = Sampler(Options(1, seed=3, **fields), 0)
    counts = torch.zeros(logits.numel())
    for _ in range(count):
        sampler.counts.clear()
        counts[sampler.draw(logits).token] += 1
    return counts / count


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0.5, 0.25, 0.15, 0.07, 0.03]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_p": 0.74}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_p": 0.76}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.6}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.3408, 0.0625 / 0.3408, 0.0225 / 0.3408, 0.0049 / 0.3408, 0.0009 / 0.3408]),
        ({"temperature": 1e-300}, [1, 0, 0, 0, 0]),
        ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
        ({"logit_bias": ((4, 100.0),)}, [0, 0, 0, 0, 1]),
    ],
)
def test_shares(fields, expected):
    torch.testing.assert_close(drawn(**fields), torch.tensor(expected, dtype=torch.float32), atol=0.03, rtol=0)


def test_penalties_by_value():
    sampler = Sampler(Options(1, temperature=0.0, frequency_penalty=0.5, presence_penalty=0.25), 0)
    logits = torch.tensor([2.0, 1.0, 0.0])
    # 2.0, then 2 - .75 = 1.25, then 2 - 1.25 = .75 < 1, then 1 - .75 < .75
    assert [sampler.draw(logits).token for _ in range(4)] == [0, 0, 1, 0]
    assert logits.tolist() == [2.0, 1.0, 0.0], "the model's logits stay as they are"


def test_a_wide_nucleus_is_sorted_whole(monkeypatch):
    logits = torch.zeros(600)
    wide = drawn(3000, logits, top_p=0.95)
    assert int((wide > 0).sum()) > 500
    monkeypatch.setattr(sampling, "FEW", 2)
    torch.testing.assert_close(drawn(top_p=0.76), torch.tensor([0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0]), atol=0.03, rtol=0)


def test_logprobs_by_value():
    top = Sampler(Options(1, temperature=0.0, logprobs=2, logit_bias=((3, 100.0),)), 0).draw(LOGITS)
    assert top.token == 3
    assert top.logprob == pytest.approx(torch.log(torch.tensor(0.07)).item(), abs=1e-5)
    assert [token for token, _ in top.top] == [0, 1]
    assert Sampler(Options(1, temperature=0.0, logprobs=0), 0).draw(LOGITS).top == ()


@pytest.mark.parametrize("seed", [0, -1, (1 << 63) - 1, -(1 << 63)])
def test_every_seed_is_a_seed(seed):
    draws = [[Sampler(Options(1, seed=seed), i).draw(torch.zeros(50)).token for i in range(3)] for _ in range(2)]
    assert draws[0] == draws[1]
