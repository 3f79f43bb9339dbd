"""The card's experiment, small: forget one domain of the bundled model with one expert, and with the whole model."""

from __future__ import annotations

import pytest

from moesaic.core.documents import read_documents, select
from moesaic.evaluation.bits_per_byte import report, score_documents
from moesaic.surgery.trained import Training, first_nats, run_step
from moesaic.training.finetune import finetune
from moesaic.view import load


def bits(model, tokenizer, documents):
    return {"bits_per_byte": report("", score_documents(model, tokenizer, documents, context=128))["bits_per_byte"]}


@pytest.mark.slow
@pytest.mark.shared
def test_at_equal_forget_loss_one_expert_keeps_more_and_routes_more_alike(tmp_path, shared):
    texts, held_out = {}, {}
    for part, found, size in (("train", texts, 40_000), ("valid", held_out, 2000)):
        documents = select(read_documents(shared / "data" / "corpus" / part), size)
        found["forget"] = [d for d in documents if d.domain == "python"]
        found["retain"] = [d for d in documents if d.domain in ("prose", "math", "spanish", "lean")]
    model, tokenizer = load("bundled")
    began = first_nats(model, tokenizer, held_out["forget"], 128)()
    done = {}
    for method, options, lr in (("seuf", {"loss": "npo", "loss_options": {"beta": 0.01}}, 3e-3), ("ga", {}, 3e-4)):
        done[method] = run_step(
            "bundled", tmp_path / method, family="unlearn", method=method, options=options, texts=texts, held_out=held_out,
            train=finetune, score=bits, training=Training(steps=60, lr=lr, seq_len=128, until=began + 0.4),
        )  # fmt: skip
    one, whole = done["seuf"], done["ga"]
    for ran in (one, whole):
        assert ran["steps"][0]["steps"] < 60, "it forgot as much as was asked"
        assert ran["after"]["forget"]["bits_per_byte"] > ran["before"]["forget"]["bits_per_byte"] + 0.1
    lost = {
        name: ran["after"]["retain"]["bits_per_byte"] - ran["before"]["retain"]["bits_per_byte"] for name, ran in done.items()
    }
    assert lost["seuf"] < lost["ga"]
    assert one["router_overlap"]["retain"] > whole["router_overlap"]["retain"]
