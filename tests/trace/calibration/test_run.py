"""The whole run: groups of layers, shards, kills and resumes all give the statistics of one plain pass."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import moesaic
from moesaic.core.documents import Document
from moesaic.core.errors import BadInput
from moesaic.trace import corpus, open_trace
from moesaic.trace.calibration import calibrate, merge, open_calibration
from moesaic.trace.calibration.store import read_header
from moesaic.trace.calibration.tiers import bytes_per_layer


@pytest.fixture(scope="module")
def loaded(tiny_moe):
    return moesaic.load(tiny_moe, dtype="float32")


@pytest.fixture
def documents(tiny_data):
    rows = [json.loads(line) for name in ("prose", "code") for line in (tiny_data / f"{name}.jsonl").read_text().splitlines()]
    return [Document(row["text"], row["domain"]) for row in rows[::4]]


OPTIONS = {"context": 24, "batch_size": 3}


def same(one, other, tolerance=1e-9):
    assert len(one) == len(other)
    for layer in range(len(one)):
        mine, theirs = one.layer(layer).sums, other.layer(layer).sums
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert torch.allclose(mine[name], theirs[name], rtol=tolerance, atol=1e-9), (layer, name)


def test_layer_by_layer_is_the_same(loaded, documents, tmp_path):
    tiers = "R0,R1,R2,A1"
    whole = calibrate(loaded, documents, tmp_path / "whole", tiers=tiers, **OPTIONS)
    groups = calibrate(loaded, documents, tmp_path / "groups", tiers=tiers, layers_at_once=1, **OPTIONS)
    same(whole, groups)
    assert groups.header.progress["groups"] == 2
    assert whole.header.progress["complete"] and groups.header.progress["complete"]
    tokens = sum(len(p.ids) for p in corpus.pieces(documents, loaded.tokenizer, 24))
    assert whole.layer(0)["token_count"] == tokens == whole.header.progress["tokens"]


def test_memory_decides_the_groups(loaded, documents, tmp_path):
    with pytest.raises(BadInput, match="--memory"):
        calibrate(loaded, documents, tmp_path / "a", memory=100, **OPTIONS)
    assert not (tmp_path / "a").exists()
    one = max(bytes_per_layer(block, ("R2",)) for block in moesaic.view(loaded.model))
    for name, memory, groups in (("a", 2 * one, 1), ("b", 2 * one - 1, 2)):
        found = calibrate(loaded, documents, tmp_path / name, tiers="R2", memory=memory, **OPTIONS)
        assert found.header.progress["groups"] == groups


def test_batches_do_not_matter(loaded, documents, tmp_path):
    one = calibrate(loaded, documents, tmp_path / "a", context=24, batch_size=1)
    many = calibrate(loaded, documents, tmp_path / "b", context=24, batch_size=8)
    same(one, many, 1e-4)


def test_shards_add_up(loaded, documents, tmp_path):
    whole = calibrate(loaded, documents, tmp_path / "whole", by_domain=True, context=24, batch_size=1)
    options = {"by_domain": True, "context": 24, "batch_size": 1}
    parts = [calibrate(loaded, documents, tmp_path / str(i), shard=(i, 3), **options) for i in range(3)]
    total = merge(parts, tmp_path / "sum")
    same(whole, total, 1e-6)
    assert total.layer(0, "code")["token_count"] == whole.layer(0, "code")["token_count"]
    assert total.header.progress["tokens"] == whole.header.progress["tokens"]
    other = calibrate(loaded, documents, tmp_path / "other", tiers="R0", **OPTIONS)
    with pytest.raises(BadInput, match="different tiers"):
        merge([parts[0], other], tmp_path / "none")
    with pytest.raises(BadInput, match="exists"):
        merge(parts, tmp_path / "sum")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("layers_at_once", [None, 1])
def test_killed_and_resumed_with_its_trace(loaded, documents, tmp_path, layers_at_once, monkeypatch):
    """Killed after a state was saved and more had been recorded: nothing is lost and nothing is counted twice."""
    options = {**OPTIONS, "tiers": "R0,R1", "layers_at_once": layers_at_once, "save_seconds": 0.0}
    whole = calibrate(loaded, documents, tmp_path / "whole", trace=tmp_path / "whole.moetrace", **options)
    forward, calls = corpus.forward, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == at:
            raise Killed
        return forward(*arguments)

    at = 3
    monkeypatch.setattr(corpus, "forward", failing)
    with pytest.raises(Killed):
        calibrate(loaded, documents, tmp_path / "part", trace=tmp_path / "part.moetrace", **options)
    assert read_header(tmp_path / "part").progress["pieces_done"] > 0
    at = 7
    with pytest.raises(Killed):
        calibrate(loaded, documents, tmp_path / "part", trace=tmp_path / "part.moetrace", resume=True, **options)
    at = -1
    with pytest.raises(BadInput, match="other tiers"):
        calibrate(loaded, documents, tmp_path / "part", resume=True, **{**options, "tiers": "R0"})
    with pytest.raises(BadInput, match="context 24, not 16"):
        calibrate(loaded, documents, tmp_path / "part", resume=True, **{**options, "context": 16})
    part = calibrate(loaded, documents, tmp_path / "part", trace=tmp_path / "part.moetrace", resume=True, **options)
    same(whole, part)
    one, two = open_trace(tmp_path / "whole.moetrace"), open_trace(tmp_path / "part.moetrace")
    assert np.array_equal(one.experts_TLK, two.experts_TLK)
    assert np.array_equal(one.tokens_T, two.tokens_T)
    assert [p.name for p in (tmp_path / "part").iterdir() if p.name.startswith(("state", "."))] == [part.header.state]
    with pytest.raises(BadInput, match="complete"):
        calibrate(loaded, documents, tmp_path / "part", resume=True, **options)


def test_counts_are_those_of_the_trace(loaded, documents, tmp_path):
    found = calibrate(loaded, documents, tmp_path / "a", trace=tmp_path / "a.moetrace", **OPTIONS)
    trace = open_trace(tmp_path / "a.moetrace")
    for layer in range(2):
        counts = np.bincount(np.asarray(trace.experts_TLK[:, layer]).ravel(), minlength=4)
        assert found.layer(layer)["selection_count"].tolist() == counts.tolist()
        assert abs(found.layer(layer).frequency_E.sum() - 2) < 1e-12


def test_features_are_the_layers_inputs_and_outputs(loaded, documents, tmp_path):
    found = calibrate(loaded, documents, tmp_path / "a", tiers="C,R0", layers_at_once=1, **OPTIONS)
    x_TD, y_TD = found.features(1)
    assert len(x_TD) == len(y_TD) == found.header.progress["tokens"]
    block = moesaic.view(loaded.model)[1]
    with torch.no_grad():
        y = block.parent(torch.tensor(x_TD)[None])
    y = y[0] if isinstance(y, tuple) else y
    assert np.allclose(y[0].numpy() if y.dim() == 3 else y.numpy(), y_TD, atol=1e-5)


def test_gradients_are_those_of_autograd(loaded, documents, tmp_path):
    model = loaded.model
    found = calibrate(loaded, documents[:3], tmp_path / "a", tiers="B", context=24, layers_at_once=1)
    pieces = list(corpus.pieces(documents[:3], loaded.tokenizer, 24))
    block = moesaic.view(model)[1]
    fisher = torch.zeros_like(block.experts.down_proj)
    for piece in pieces:
        ids = torch.tensor([piece.ids])
        if ids.shape[1] < 2:
            continue
        model(input_ids=ids, labels=ids).loss.backward()
        fisher += block.experts.down_proj.grad.square()
        model.zero_grad()
    stats = found.layer(1)
    assert torch.allclose(stats["fisher.down_proj_sum"], fisher, rtol=1e-3, atol=1e-12)
    assert stats["fisher.router.weight_sum"].shape == block.router.weight.shape
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("layers_at_once", [None, 1])
def test_gradients_beside_the_other_tiers_and_a_trace(loaded, documents, tmp_path, layers_at_once):
    """The passes of tier B are in no other tier and in no trace."""
    options = {"context": 24, "batch_size": 3, "layers_at_once": layers_at_once}
    alone = calibrate(loaded, documents[:3], tmp_path / "alone", tiers="B", **options)
    plain = calibrate(loaded, documents[:3], tmp_path / "plain", tiers="R0,R1", **options)
    both = calibrate(loaded, documents[:3], tmp_path / "both", tiers="R0,R1,B", trace=tmp_path / "a.moetrace", **options)
    for layer in range(2):
        found = both.layer(layer).sums
        for name, tensor in (alone.layer(layer).sums | plain.layer(layer).sums).items():
            assert torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-9), name
    assert len(open_trace(tmp_path / "a.moetrace")) == both.header.progress["tokens"]


def test_derived_quantities(loaded, documents, tmp_path):
    stats = calibrate(loaded, documents, tmp_path / "a", **OPTIONS).layer(0)
    assert torch.allclose(stats.mean("norm"), stats["norm_sum"] / stats["selection_count"].clamp(min=1))
    assert torch.allclose(stats.logit_similarity_EE.diagonal(), torch.ones(4, dtype=torch.float64))
    assert (stats.output_variance_ED >= 0).all()
    assert 0 < stats.quantile("second_over_first", 0.25) <= stats.quantile("second_over_first", 0.75) <= 1
    with pytest.raises(BadInput, match="no input_gram_sum"):
        _ = stats["input_gram_sum"]


def test_folders_that_are_none(loaded, documents, tmp_path):
    with pytest.raises(BadInput, match="no calibration"):
        open_calibration(tmp_path)
    (tmp_path / "header.json").write_text("{}")
    with pytest.raises(BadInput, match="broken header"):
        open_calibration(tmp_path)
    (tmp_path / "header.json").write_text('{"version": 9}')
    with pytest.raises(BadInput, match="upgrade"):
        open_calibration(tmp_path)
    found = calibrate(loaded, documents, tmp_path / "a", tiers="R0", **OPTIONS)
    next((tmp_path / "a" / found.header.state).glob("layer-000*")).write_bytes(b"cut")
    with pytest.raises(BadInput, match="layer-000"):
        found.layer(0)
    with pytest.raises(BadInput, match="exists"):
        calibrate(loaded, documents, tmp_path / "a", tiers="R0", **OPTIONS)
    with pytest.raises(BadInput, match="no text"):
        calibrate(loaded, [], tmp_path / "b", **OPTIONS)
