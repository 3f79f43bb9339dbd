"""SDM: the activation's limits, similarity and distance by hand, the band, and what is admitted on and off the support."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from moesaic.core.errors import BadInput
from moesaic.steering import bound, write
from moesaic.steering.sdm import Sdm, features, read_store, write_store
from moesaic.steering.sdm_model import SOFTMAX_Q, Calibrated, Distances, Support, band, calibrate, ecdf, fit, sdm, sdm_loss


def test_softmax_and_uniform():
    logits = torch.randn(20, 4, dtype=torch.float64)
    one, q = torch.ones(20, dtype=torch.float64), torch.full((20,), SOFTMAX_Q, dtype=torch.float64)
    assert (sdm(logits, q, one) - logits.softmax(-1)).abs().max() < 1e-15
    torch.testing.assert_close(sdm(logits, q * 7, 0 * one), torch.full_like(logits, 0.25))
    assert torch.equal(sdm(logits, q * 5, one * 0.01).argmax(-1), logits.argmax(-1))
    by_hand = (2 + q[:, None] * 3) ** (0.4 * logits)
    torch.testing.assert_close(sdm(logits, q * 3, one * 0.4), by_hand / by_hand.sum(-1, keepdim=True))


def test_surer_with_more_similarity_and_less_distance():
    logits = torch.randn(50, 3)
    for fixed in (0.2, 0.9):
        best = [sdm(logits, torch.full((50,), float(q)), torch.full((50,), fixed)).amax(-1) for q in range(6)]
        assert all((b >= a - 1e-6).all() for a, b in pairwise(best))
    for q in (0.0, 4.0):
        best = [sdm(logits, torch.full((50,), q), torch.full((50,), d / 5)).amax(-1) for d in range(6)]
        assert all((b >= a - 1e-6).all() for a, b in pairwise(best))


def test_the_loss_at_softmax_is_cross_entropy():
    logits, labels = torch.randn(9, 3), torch.randint(0, 3, (9,))
    loss = sdm_loss(logits, torch.full((9,), SOFTMAX_Q), torch.ones(9), labels)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels))


def test_similarity_by_hand():
    """On a line: the nearest right and agreeing points are counted up to the first failure."""
    support = Support(
        torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]), torch.tensor([0, 0, 1, 0, 0]), torch.tensor([0, 0, 0, 0, 0])
    )
    q, nearest = support.look(torch.tensor([[0.0], [6.0], [3.1]]), torch.tensor([0, 0, 0]))
    assert q.tolist() == [2.0, 2.0, 0.0], "the point at 3 is wrong"
    torch.testing.assert_close(nearest, torch.tensor([1.0, 1.0, 0.1]))
    assert support.look(torch.tensor([[0.0]]), torch.tensor([1]))[0].tolist() == [0.0], "of another class"
    own, apart = support.look(support.h_nM, support.predicted_n, own=True)
    assert apart.tolist() == [1.0] * 5
    assert own[0] == 1.0, "the point itself does not count"


def test_distance():
    nearest, labels, q = torch.tensor([1.0, 2.0, 3.0, 1.5]), torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 2.0, 1.0, 0.0])
    d = Distances(nearest, labels, q, 2).d(torch.tensor([0.0, 1.0, 2.5, 9.0]))
    assert d.tolist() == [1.0, 0.5, 0.0, 0.0]
    assert Distances(nearest, labels, torch.zeros(4), 2).d(torch.tensor([0.0])).tolist() == [0.0], "nothing is near to nothing"
    assert ecdf(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.0, 3.0])).tolist() == [0.0, 0.5, 1.0]


def test_the_band_narrows():
    eps = band(torch.tensor([0.0, 1.0, 10.0, 100.0]), 0.95)
    assert eps[0] == 1
    assert (eps[1:-1] > eps[2:]).all()
    assert float(eps[3]) == pytest.approx(math.sqrt(math.log(40) / 200))


def clouds(count, shift=0.0, seed=0):
    """Two classes, six apart along one of eight axes, labels right for all but one in thirty; `shift` moves to new ground."""
    random = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (count,), generator=random)
    x = torch.randn(count, 8, generator=random)
    x[:, 0] += 6.0 * label - 3.0
    x[:, 1] += shift
    flipped = torch.rand(count, generator=random) < 1 / 30
    return x, torch.where(flipped, 1 - label, label)


@pytest.fixture(scope="module")
def judge():
    x, label = clouds(1200)
    return calibrate(x, label, 2, alpha=0.9, splits=3, epochs=6, lr=1e-3, width=8, rescale_epochs=5, rescale_lr=1e-3)


def test_what_is_admitted_is_right_and_what_is_far_is_not_admitted(judge):
    x, label = clouds(400, seed=1)
    near = judge.judge(x)
    admitted = near.admitted_m
    assert admitted.float().mean() > 0.2
    assert (near.predicted_m[admitted] == label[admitted]).float().mean() >= 0.9
    far = judge.judge(clouds(400, shift=40.0, seed=2)[0])
    assert not far.admitted_m.any()
    assert (far.d_m == 0).all()
    with torch.no_grad():
        logits = judge.fitted.net(clouds(400, shift=40.0, seed=2)[0])[1]
    assert (logits.softmax(-1).amax(-1) >= 0.9).float().mean() > 0.1, "a softmax threshold would admit many"


def test_a_higher_alpha_never_admits_more(judge):
    x, label = clouds(600, seed=5)
    points = clouds(300, seed=6)[0]
    before = None
    for alpha in (0.6, 0.8, 0.9, 0.97):
        admitted = Calibrated(judge.fitted, x, label, alpha, epochs=1).judge(points).admitted_m
        assert before is None or not (admitted & ~before).any()
        before = admitted


def test_a_store_keeps_the_verdicts(judge, tmp_path):
    path = write_store(tmp_path / "x.safetensors", judge, ["no", "yes"])
    again, names = read_store(path)
    assert names == ["no", "yes"]
    points = torch.cat([clouds(50, seed=8)[0], clouds(50, shift=9.0, seed=9)[0]])
    for a, b in zip(vars(judge.judge(points)).values(), vars(again.judge(points)).values(), strict=True):
        assert torch.equal(a, b)
    (tmp_path / "bad").write_bytes(b"12345678")
    for name in ("bad", "none"):
        with pytest.raises(BadInput, match="SDM store"):
            read_store(tmp_path / name)


def test_it_abstains_off_its_support(mixtral, tmp_path):
    """Prompts of two kinds, told apart by their last token's state; a prompt of neither is refused, or only noted."""
    random = torch.Generator().manual_seed(0)
    kinds = [[8, 9, 10], [70, 71, 72]]
    rows = [([*torch.randint(20, 60, (4,), generator=random).tolist(), *kinds[k % 2]], k % 2) for k in range(600)]
    x = torch.stack([features(mixtral, ids) for ids, _ in rows])
    label = torch.tensor([kind for _, kind in rows])
    made = calibrate(x, label, 2, alpha=0.8, splits=1, epochs=8, lr=1e-2, width=8, rescale_epochs=5, rescale_lr=1e-3)
    path = str(write_store(tmp_path / "kinds.safetensors", made, ["low", "high"]))
    steer = bound(mixtral, Sdm(path))
    courses = [(steer.start(ids), kind) for ids, kind in rows[:40]]
    admitted = [(course.notes["sdm"], kind) for course, kind in courses if course.refused is None]
    assert len(admitted) >= 8
    assert sum(note["class"] == ["low", "high"][kind] for note, kind in admitted) >= 0.8 * len(admitted)
    assert all(note["admitted"] for note, _ in admitted)
    far = [127, 126, 125, 124]
    assert "outside" in steer.start(far).refused
    given = torch.tensor([far])
    assert torch.equal(write(mixtral, given, steer, max_new_tokens=4, do_sample=False), given), "no token is written"
    noted = bound(mixtral, Sdm(path, abstain=False)).start(far)
    assert noted.refused is None and noted.notes["sdm"]["admitted"] is False


def test_bad_input_is_named():
    x, label = clouds(40)
    with pytest.raises(BadInput, match="class 2 has no training point"):
        fit(x, label, x, label, 3, epochs=1)
    with pytest.raises(BadInput, match=r"alpha 0\.4"):
        Calibrated(fit(x, label, x, label, 2, epochs=1), x, label, 0.4)
