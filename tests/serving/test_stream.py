"""Streaming never breaks a character and never loses one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moesaic.serving.stream import TextPieces, token_texts

TEXT = "naïve 🙂 નમસ્તે — 𝄞\n\n  x = 1 "


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return AutoTokenizer.from_pretrained(tiny_tokenizer)


def test_pieces_are_whole_characters(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    stream = TextPieces(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == TEXT
    assert stream.flush() == ""
    assert "\ufffd" not in "".join(pieces)
    assert "" in pieces, "the smiley takes several byte tokens: some wait"


@given(st.lists(st.integers(1, 299), max_size=40))
@settings(deadline=None)
def test_any_ids_join_to_their_decoding(tokenizer, ids):
    """Also ids that are not valid UTF-8, as an untrained model makes them."""
    stream = TextPieces(tokenizer)
    text = "".join(stream.push(i) for i in ids) + stream.flush()
    assert text == tokenizer.decode(ids)


def test_special_tokens_stay_out_of_the_stream_but_not_out_of_the_page(tokenizer):
    ids = [*tokenizer("a")["input_ids"], tokenizer.eos_token_id, *tokenizer("b")["input_ids"]]
    stream = TextPieces(tokenizer)
    assert "".join(map(stream.push, ids)) == "ab"
    assert token_texts(tokenizer, ids) == ["a", "<|endoftext|>", "b"]


def test_token_texts_give_a_split_character_to_its_last_token(tokenizer):
    ids = tokenizer("🙂")["input_ids"]
    assert len(ids) == 4
    assert token_texts(tokenizer, ids) == ["", "", "", "🙂"]
    assert token_texts(tokenizer, ids[:2]) == ["", "\ufffd"]
    assert token_texts(tokenizer, []) == []
