"""`moesaic analyze COUNTS.npz`: hand-made tables, and the recorded ones of two published models."""

from __future__ import annotations

import json

import numpy as np
import pytest


def test_hand_made_tables(moesaic, tmp_path):
    one, two = np.array([[4, 4, 0, 0], [2, 2, 2, 2]]), np.array([[0, 0, 4, 4], [2, 2, 2, 2]])
    np.savez(tmp_path / "a.npz", layers=[3, 9], **{"x.counts": one, "y.counts": two, "x.pairs": 8 * np.eye(4, dtype=int)[None]})
    result = moesaic("analyze", "a.npz", "--json")
    assert result.code == 0, result
    found = json.loads(result.out)
    first = found["layers"][0]
    assert (first["name"], first["cv"], first["domains"]["x"]["cv"]) == ("layer 3", 0.0, 1.0)
    assert found["domain_distance"]["x, y"] == [1.0, 0.0]
    assert found["affinity"][0]["layers"] == [3, 9]
    assert found["affinity"][0]["mutual_bits"] == pytest.approx(2.0)
    assert found["affinity"][0]["likeliest_successor"] == 1.0
    assert "x, y" in moesaic("analyze", "a.npz").out


@pytest.mark.parametrize(
    ("arrays", "words"),
    [({"other": np.ones(3)}, "no array DOMAIN.counts"), ({"x.counts": np.ones(3)}, "must be [layers, experts]")],
)
def test_bad_tables(moesaic, tmp_path, arrays, words):
    np.savez(tmp_path / "a.npz", **arrays)
    assert words in moesaic("analyze", "a.npz").complaint
    assert "no such file" in moesaic("analyze", "none.npz").complaint


@pytest.mark.shared
@pytest.mark.parametrize("name", ["olmoe", "mixtral"])
def test_recorded_tables(moesaic, shared, name):
    found = json.loads(moesaic("analyze", shared / "data" / "routing" / f"{name}-counts.npz", "--json").out)
    assert [row["name"] for row in found["layers"]] == ["layer 0", "layer 7", "layer 15"]
    for row in found["layers"]:
        assert sum(row["load"]) == pytest.approx(1)
    for row in found["affinity"]:
        assert row["mutual_bits"] > row["null_bits"]
