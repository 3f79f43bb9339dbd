"""The scores against a computation that shares nothing with them: one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic.core.documents import Document, select
from moesaic.core.errors import BadInput
from moesaic.evaluation.bits_per_byte import report, score_documents

NON_BMP = "𝄞 clef, 🙂🙃 faces, 𓀀"


@pytest.fixture(scope="module")
def loaded(tiny_moe):
    return AutoModelForCausalLM.from_pretrained(tiny_moe).eval(), AutoTokenizer.from_pretrained(tiny_moe)


@torch.no_grad()
def one_token(model, before: list[int], target: int) -> float:
    return -model(input_ids=torch.tensor([before])).logits[0, -1].double().log_softmax(-1)[target].item()


def naive_nats(model, tokenizer, text: str, context: int, stride: int) -> float:
    ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
    total = 0.0
    for target in range(1, len(ids)):
        # The window that scores this target ends `context` plus whole strides after the start, or with the document.
        end = min(len(ids) - 1, context + stride * max(0, math.ceil((target - context) / stride)))
        total += one_token(model, ids[max(0, end - context) : target], ids[target])
    return total


@pytest.mark.parametrize(("context", "stride", "batch"), [(64, 64, 4), (16, 8, 3), (16, 1, 5), (7, 7, 1), (12, 5, 16)])
def test_equals_the_naive_computation(loaded, context, stride, batch):
    texts = {"long": "expert router " * 12, "short": "a", "other": NON_BMP, "empty": ""}
    documents = [Document(text, name) for name, text in texts.items()]
    scores = score_documents(*loaded, documents, context, stride, batch)
    for name, text in texts.items():
        expected = naive_nats(*loaded, text, context, stride)
        assert scores[name].nats == pytest.approx(expected, rel=1e-4)
        assert scores[name].tokens == len(loaded[1](text)["input_ids"] if text else [])
        assert scores[name].bytes == len(text.encode())


def test_whole_documents_that_fit_are_scored_in_one_pass(loaded):
    """Full context, no windows: the loss that transformers itself computes."""
    model, tokenizer = loaded
    text = "keeps the best two, and weighs what they return"
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert score_documents(model, tokenizer, [Document(text, "d")])["d"].nats == pytest.approx(expected, rel=1e-5)


def test_one_token_document_is_paid_for(loaded):
    model, tokenizer = loaded
    (target,) = tokenizer("x")["input_ids"]
    score = score_documents(model, tokenizer, [Document("x", "d")])["d"]
    assert score.tokens == 1
    assert score.nats == pytest.approx(one_token(model, [tokenizer.eos_token_id], target), rel=1e-5)


def test_overall_is_total_bits_over_total_bytes(loaded):
    documents = [Document("router " * 20, "a"), Document("નમસ્તે", "b"), Document("", "c")]
    scores = score_documents(*loaded, documents)
    result = report("m", scores)
    bits = sum(row["bits_per_byte"] * row["bytes"] for row in result["domains"].values() if row["bytes"])
    assert result["bits_per_byte"] == pytest.approx(bits / result["bytes"])
    assert result["mean_bits_per_byte"] == pytest.approx(
        (result["domains"]["a"]["bits_per_byte"] + result["domains"]["b"]["bits_per_byte"]) / 2
    )
    assert result["domains"]["c"]["bits_per_byte"] is None
    a = result["domains"]["a"]
    assert a["perplexity"] == pytest.approx(2 ** (a["bits_per_byte"] * a["bytes"] / a["tokens"]))


def test_a_tokenizer_that_loses_text_is_reported(loaded):
    model, tokenizer = loaded

    class Lossy:
        bos_token_id, eos_token_id = None, tokenizer.eos_token_id

        def __len__(self):
            return len(tokenizer)

        def __call__(self, text, **kwargs):
            return tokenizer(text.lower())

        def decode(self, ids, **kwargs):
            return tokenizer.decode(ids, **kwargs)

    scores = score_documents(model, Lossy(), [Document("The Router", "d"), Document("small", "d")])
    assert scores["d"].lossy_documents == 1
    assert score_documents(model, tokenizer, [Document("The Router" + NON_BMP, "d")])["d"].lossy_documents == 0


def test_max_bytes_caps_each_domain_at_a_character():
    documents = [Document("ééé", "a"), Document("abc", "b"), Document("xyz", "a"), Document("later", "b")]
    kept = select(documents, 5)
    assert kept == [Document("éé", "a"), Document("abc", "b"), Document("la", "b")]
    shuffled = select([Document(str(i), "a") for i in range(50)], 10, seed=1)
    assert len({d.text for d in shuffled} - {str(i) for i in range(10)}) > 0


@pytest.mark.parametrize(
    ("context", "stride", "words"),
    [(0, None, "--context 0"), (65, None, "1 to 64"), (8, 9, "--stride 9"), (8, 0, "--stride 0")],
)
def test_sizes_that_make_no_sense(loaded, context, stride, words):
    with pytest.raises(BadInput, match=words):
        score_documents(*loaded, [Document("x", "d")], context, stride)


def test_text_that_cannot_be_scored(loaded):
    with pytest.raises(BadInput, match="no text"):
        score_documents(*loaded, [Document("", "d")])
    with pytest.raises(BadInput, match="surrogate"):
        score_documents(*loaded, [Document("\ud800", "d")])
