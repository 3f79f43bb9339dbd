"""The cards are filled from files, block by block, and their verdict counts what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesaic.core.errors import BadInput
from moesaic.evaluation.cards import fill, main, results_block
from moesaic.evaluation.compressors import compare, xz, zstd

DOCS = Path(__file__).resolve().parents[2] / "docs"


def domain(bits, xz=3.0, zstd=2.9):
    return {
        "bits_per_byte": bits, "perplexity": 12.34, "tokens": 10, "bytes": 4000,
        "xz_bits_per_byte": xz, "zstd_bits_per_byte": zstd,
    }  # fmt: skip


def scores(**domains):
    mean = sum(domains.values()) / len(domains)
    rows = {name: domain(bits) for name, bits in domains.items()}
    return {**domain(mean), "mean_bits_per_byte": mean, "domains": rows, "context": 512, "stride": 256, "dtype": "bfloat16"}


def test_fill_replaces_only_its_block():
    card = "a\n<!-- x:begin -->\nold \\1\n<!-- x:end -->\nb\n<!-- y:begin -->\n<!-- y:end -->\n"
    once = fill(card, "x", "new \\g<0>\n")
    assert once == card.replace("old \\1", "new \\g<0>")
    assert fill(once, "x", "new \\g<0>") == once
    with pytest.raises(BadInput, match="no block <!-- z:begin -->"):
        fill(card, "z", "")


def test_results_count_wins_and_name_losses():
    block = results_block(scores(prose=2.0, code=3.1), scores(prose=2.1, code=3.0))
    assert "| prose | **2.000** | 2.100 | 3.000 | 2.900 | 12.3 | 4,000 |" in block
    assert "| **all** | **2.550** | **2.550** |" in block
    assert "fewer bits than xz -9 in 1 of 2 domains (not in code)" in block
    assert "fewer than the dense twin in 1 of 2 (not in code), 0.0% more on the mean" in block
    alone = results_block(scores(prose=2.0), None)
    assert "twin" not in alone
    assert "in 1 of 1 domains;" in alone


def test_commands_fill_the_real_cards(tmp_path, tiny_data, capsys):
    run = tmp_path / "run"
    run.mkdir()
    config = {"model": {"model_type": "qwen3_moe"}, "batch_size": 2, "seq_len": 8, "steps": 5, "lr": 0.1, "schedule": "wsd"}
    (run / "config.json").write_text(json.dumps({**config, "warmup": 1, "balance": {"z": 0.1}, "dtype": "float32", "seed": 3}))
    rows = [{"step": i, "loss": 5.0 - i, "seconds": 36.0 * i, "max_vio": [0.5], "valid_loss": 4.0} for i in range(5)]
    (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step')
    (tmp_path / "eval.json").write_text(json.dumps(scores(prose=2.0)))
    card = tmp_path / "card.md"
    card.write_text((DOCS / "model-card.md").read_text())
    assert main(["model", str(card), "--run", str(run), "--eval", str(tmp_path / "eval.json")]) == 0
    text = card.read_text()
    for words in ("| steps | 5 of 5 |", "| tokens seen | 80 |", "| seed | 3 |", "5: 4.000", "| **all** | **2.000**", "0.04 h"):
        assert words in text, words
    data = tmp_path / "data.md"
    data.write_text((DOCS / "data-card.md").read_text())
    assert main(["data", str(data), "--train", str(tiny_data), "--valid", str(tiny_data / "code.jsonl")]) == 0
    assert "| code | 24 |" in data.read_text()
    assert main(["model", str(card), "--run", str(tmp_path / "gone")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_compressors_by_hand():
    import lzma

    data = b"the router keeps the best two " * 50
    assert xz(data) == pytest.approx(8 * len(lzma.compress(data, preset=9)) / len(data))
    found = compare([data.decode()[:700], data.decode()[700:]])
    assert found["xz"] == pytest.approx(xz(data))
    if zstd(data) is not None:
        assert 0 < found["zstd"] < 1
    assert compare([""]) == {"xz": None, "zstd": None}
