"""The token stream is a function of (seed, step); its cache follows the data."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from transformers import AutoTokenizer

from moesaic.core.errors import BadInput
from moesaic.training.data import PackedTokens, tokenize


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return AutoTokenizer.from_pretrained(tiny_tokenizer)


def stream(lengths, seq_len=8, seed=3):
    starts = np.cumsum([0, *lengths])
    return PackedTokens(np.arange(starts[-1], dtype=np.uint32), starts, seq_len, seed)


def test_an_epoch_holds_every_token_and_the_next_another_order():
    packed = stream([13, 30, 7, 51])
    rows = packed.rows(0, packed.rows_per_epoch).numpy()
    assert rows.shape == (12, 9)
    assert len(set(rows[:, :-1].flatten().tolist())) == 12 * 8
    again = packed.rows(packed.rows_per_epoch, packed.rows_per_epoch).numpy()
    assert not np.array_equal(rows, again)


def test_rows_do_not_depend_on_what_was_asked_before():
    one, other = stream([40, 60, 20]), stream([40, 60, 20])
    other.rows(29, 2)
    assert np.array_equal(one.rows(5, 20).numpy(), other.rows(5, 20).numpy())
    assert not np.array_equal(one.rows(5, 20).numpy(), stream([40, 60, 20], seed=4).rows(5, 20).numpy())


def test_the_cache_serves_until_the_data_or_the_tokenizer_change(tmp_path, tokenizer):
    file, cache = tmp_path / "d.jsonl", tmp_path / "cache.npz"
    file.write_text(json.dumps({"text": "router " * 30}) + "\n")
    first = tokenize(file, tokenizer, cache, 8, 0)
    stamp = cache.stat().st_mtime_ns
    assert np.array_equal(tokenize(file, tokenizer, cache, 8, 0).ids_N, first.ids_N)
    assert cache.stat().st_mtime_ns == stamp
    file.write_text(json.dumps({"text": "expert " * 30}) + "\n")
    os.utime(file, ns=(1, 1))
    second = tokenize(file, tokenizer, cache, 8, 0)
    assert tokenizer.decode(second.ids_N[:-1]) == "expert " * 30
    assert second.fingerprint != first.fingerprint
    cache.write_bytes(cache.read_bytes()[:50])
    assert np.array_equal(tokenize(file, tokenizer, cache, 8, 0).ids_N, second.ids_N)


def test_too_little_data_says_so(tmp_path, tokenizer):
    file = tmp_path / "d.txt"
    file.write_text("short")
    with pytest.raises(BadInput, match=r"d\.txt: .*fewer than one sequence of 64"):
        tokenize(file, tokenizer, tmp_path / "cache.npz", 64, 0)
    assert not list(tmp_path.glob(".*"))
