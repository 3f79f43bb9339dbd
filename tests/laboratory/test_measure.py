"""The numbers of a cell, against what can be worked out by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moesaic.core.documents import Document
from moesaic.core.routing import Pairs, Routing
from moesaic.laboratory import measure

SHAPE = {
    "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "experts": 4, "k": 2,
    "expert_width": 12, "max_position_embeddings": 64,
}  # fmt: skip


def model_of(**fields):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("moesaic", **{**SHAPE, **fields}))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_flops_are_those_of_the_matrix_products(k):
    model, rows = model_of(k=k), torch.randint(0, 48, (3, 10))
    attention = 4 * 2 * 16 * 16 + 2 * 2 * 10 * 16  # projections, then scores and mixing over ten tokens
    layer = attention + 2 * 16 * 4 + k * 3 * 2 * 16 * 12
    assert measure.flops_per_token(model, rows) == pytest.approx(2 * layer + 2 * 16 * 48)
    assert model.training and model.model.blocks[0].moe.bank.kernel == "auto", "put back as it was"
    assert model.config._attn_implementation != "eager"


def test_a_width_is_fitted():
    rows = torch.randint(0, 48, (2, 8))
    goal = measure.flops_per_token(model_of(k=2, expert_width=24), rows)
    width, cost = measure.fit_width(lambda value: model_of(k=1, expert_width=value), rows, goal)
    assert width == 48 and cost == pytest.approx(goal)
    assert measure.fit_width(lambda value: model_of(expert_width=value), rows, 1.0)[0] == 4, "the nearest there is"


def test_sets_and_changes():
    logits = torch.zeros(3, 4)
    slots = Routing(logits, experts_TK=torch.tensor([[0, 1], [2, -1], [3, 0]]), weights_TK=torch.ones(3, 2))
    swapped = Routing(logits, experts_TK=torch.tensor([[1, 0], [2, 3], [3, 0]]), weights_TK=torch.ones(3, 2))
    a, b = measure.expert_sets(slots), measure.expert_sets(swapped)
    assert a.tolist() == [[True, True, False, False], [False, False, True, False], [True, False, False, True]]
    assert measure.changed([a], [b]) == pytest.approx(1 / 3), "an order is no change, an added expert is"
    pairs = Routing(logits, pairs=Pairs(torch.tensor([0, 0, 2]), torch.tensor([1, 0, 3]), torch.ones(3)))
    assert measure.expert_sets(pairs).sum().item() == 3
    soft = Routing(logits, merge_GE=torch.ones(1, 4), group_T=torch.zeros(3, dtype=torch.long))
    assert measure.expert_sets(soft) is None and measure.changed([None], [None]) is None
    assert measure.changed([None, a], [None, a]) == 0.0


def test_load_counts_true_experts_only():
    model = model_of(router="adamoe", k=3).eval()
    rows = torch.randint(0, 48, (4, 12))
    routings = measure.routings_of(model, rows)
    found = measure.load(model, routings)
    counts = [routing.counts_E()[:4] for routing in routings]
    assert routings[0].num_experts > 4
    assert found["max_vio"] == pytest.approx(sum((c.max() * 4 / c.sum()).item() - 1 for c in counts) / 2)
    assert found["experts_per_token"] == pytest.approx(sum(c.sum().item() for c in counts) / 2 / 48)
    assert measure.load(model_of(experts=0, k=None), ()) == dict.fromkeys(found)


def test_masked_bits_pay_for_every_byte(tiny_tokenizer):
    """Equal logits cost log2 V bits per token, whatever is hidden."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    model = model_of(vocab_size=len(tokenizer) + 1, causal=False, mask_token_id=len(tokenizer)).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    ids = tokenizer("a plain line of text, some words " * 20)["input_ids"]
    rows = torch.tensor(ids[:32]).view(2, 16)
    size = sum(len(tokenizer.decode([token]).encode()) for token in rows.flatten().tolist())
    expected = 32 * torch.log2(torch.tensor(len(tokenizer) + 1.0)).item() / size
    assert measure.masked_bits_per_byte(model, tokenizer, rows) == pytest.approx(expected, rel=1e-4)


def test_held_out_takes_the_beginning_of_every_domain(tmp_path):
    import json

    path = tmp_path / "d.jsonl"
    texts = [("a", "x" * 6), ("a", "y" * 6), ("b", "z" * 3), ("a", "w")]
    path.write_text("".join(json.dumps({"text": text, "domain": domain}) + "\n" for domain, text in texts))
    assert measure.held_out(str(path), 8) == [Document("x" * 6, "a"), Document("yy", "a"), Document("zzz", "b")]
