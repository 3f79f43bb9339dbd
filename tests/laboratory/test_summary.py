"""Rows over seeds, what may be said of a difference, and the page that says it."""

from __future__ import annotations

import pytest

from moesaic.laboratory.document import document, verdicts
from moesaic.laboratory.summary import MEASURES, closest, difference, noise, rows


def cell(name, seed, score, status="done", **fields):
    results = {**dict.fromkeys(MEASURES, 1.0), "bits_per_byte": score, **fields}
    told = {"cell": f"{name}-s{seed}", "name": name, "group": "routers", "seed": seed, "status": status, "fitted": None}
    return {**told, "results": results, "curve": {}} if status == "done" else {**told, "error": "no luck"}


@pytest.fixture
def cells():
    return [
        cell("topk", 0, 2.00), cell("topk", 1, 2.02), cell("topk", 2, 2.04), cell("hash", 0, 2.03), cell("rmoe", 0, 1.80),
        cell("comet", 0, 2.50), cell("thor", 0, 0, "failed"),
    ]  # fmt: skip


def test_rows_average_over_seeds(cells):
    table = {row["name"]: row for row in rows(cells)}
    assert table["topk"]["bits_per_byte"] == pytest.approx(2.02)
    assert table["topk"]["sd"]["bits_per_byte"] == pytest.approx(0.02)
    assert table["topk"]["seeds"] == 3 and table["hash"]["sd"] == {}
    assert table["thor"]["errors"] == ["no luck"] and table["thor"]["bits_per_byte"] is None
    assert noise(rows(cells), "bits_per_byte") == pytest.approx(0.02)


def test_noise_is_pooled_by_degrees_of_freedom():
    table = rows([cell("a", 0, 0.0), cell("a", 1, 2.0), *(cell("b", i, v) for i, v in enumerate((0.0, 0.0, 0.0)))])
    assert noise(table, "bits_per_byte") == pytest.approx((2.0 / 3) ** 0.5)  # variances 2 and 0, freedoms 1 and 2


def test_masked_models_have_their_own_noise():
    masked = [{**cell("m", seed, 5.0 * seed), "group": "masked"} for seed in (0, 1)]
    table = rows([cell("a", 0, 1.0), cell("a", 1, 1.2), *masked])
    assert noise(table, "bits_per_byte") == pytest.approx(0.02**0.5)
    assert noise(table, "bits_per_byte", masked=True) == pytest.approx(12.5**0.5)


def test_differences_inside_the_spread_cannot_be_told(cells):
    table = rows(cells)
    error = 0.02 * (1 + 1 / 3) ** 0.5
    near = difference(table, "hash", "topk")
    assert near["gap"] == pytest.approx(0.01) and near["error"] == pytest.approx(error) and near["sign"] == 0
    assert difference(table, "rmoe", "topk")["sign"] == -1
    assert difference(table, "comet", "topk")["sign"] == 1
    assert difference(table, "thor", "topk") is None and difference(table, "nobody", "topk") is None
    alone = difference(rows([cell("a", 0, 1.0), cell("b", 0, 9.0)]), "a", "b")
    assert alone["error"] is None and alone["sign"] == 0, "without a spread nothing can be told"


def test_the_closest(cells):
    assert closest(rows(cells), "topk", 2, ["routers"]) == ["hash", "rmoe"]
    assert closest(rows(cells), "topk", 9, ["layers"]) == []
    assert closest([], "topk", 3, ["routers"]) == []


def test_claims_and_the_page(cells):
    found = verdicts(rows(cells))
    assert any("`rmoe` against `topk`, bits per byte -0.220" in line for line in found["shows"])
    assert any("`comet`" in line for line in found["contrary"])
    dearer = [{**row, "flops_per_token": 1.2} if row["name"] == "rmoe" else row for row in rows(cells)]
    assert any("`rmoe`" in line and "at 1.20 times the FLOPs" in line for line in verdicts(dearer)["unequal"])
    assert not any("`rmoe`" in line for line in verdicts(dearer)["shows"])
    assert any("`hash` against `topk`, bits per byte" in line for line in found["untold"])
    assert any("thor" in line for line in found["missing"])
    model = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "experts": 4, "expert_width": 8, "k": 2}
    base = {"steps": 10, "batch_size": 2, "seq_len": 8, "lr": 0.01, "schedule": "wsd", "vocab_size": 300, "model": model}
    told = {"rows": rows(cells), "cells": cells, "missing": ["bam-s0"], "base": base, "left_out": {"m3vit": "needs task ids"}}
    text = document(told, "one core", "lab.svg", "lab.html")
    assert "| `hash` | 2.030 | +0.010, cannot be told |" in text
    assert "| `rmoe` | 1.800 | -0.220, better |" in text
    assert "| `thor` | failed: no luck |" in text
    assert "1 trainings are missing: `bam-s0`" in text and "`m3vit` needs task ids" in text
    assert "0.0200 bits per byte" in text
