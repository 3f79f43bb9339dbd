"""`moesaic bench unlearn` on a tiny model: its cells, and the planted facts."""

from __future__ import annotations

import pytest
import torch

import moesaic
from moesaic.bench import facts, unlearn
from moesaic.core.errors import BadInput


@pytest.fixture
def data(tmp_path, tiny_data):
    for part in ("train", "valid"):
        (tmp_path / part).symlink_to(tiny_data)
    return str(tmp_path)


def options(tiny_moe, data, **fields):
    small = {"steps": 2, "batch_size": 2, "seq_len": 16, "seeds": 1, "people": 4, "plant_steps": 2, "losses": ("ga",)}
    return unlearn.Options(str(tiny_moe), data, **{"domain": "code", **small, **fields})


@pytest.mark.parametrize("task", ["domain", "facts"])
def test_both_scopes_are_measured_before_and_after(task, tiny_moe, data):
    rows = unlearn.run(options(tiny_moe, data, task=task))["rows"]
    assert [row["impl"] for row in rows] == ["seuf ga", "full ga"]
    one, whole = rows
    assert len(one["edited"]) == 1 and whole["edited"] is None and one["parameters"] < whole["parameters"]
    assert one["before"] == whole["before"] and one["after"] != one["before"] and one["forget_nats_before"] > 0
    assert ("recall" in one) is (task == "facts")


def test_bad_options_are_refused(tiny_moe, data):
    with pytest.raises(BadInput, match="domain or facts"):
        unlearn.run(options(tiny_moe, data, task="dreams"))
    with pytest.raises(BadInput, match="no domain 'poetry'"):
        unlearn.run(options(tiny_moe, data, domain="poetry"))


def test_facts_are_distinct_people_told_in_every_phrasing(tiny_moe):
    known = facts.people(40)
    assert len({person.name for person in known}) == 40 and known == facts.people(40) != facts.people(40, seed=1)
    documents = facts.told(known[:2], "x")
    assert len(documents) == 6
    for document, person in zip(documents, known[:2] * 3, strict=True):
        assert all(value in document.text for value in person.facts.values()) and person.name in document.text
    model, tokenizer = moesaic.load(tiny_moe)
    share = facts.recall(model, tokenizer, known)
    assert 0.05 < share < 0.5, "a model that was told nothing guesses one in four"
    with torch.no_grad():
        model.model.norm.weight.zero_()  # every token is as likely as any other: nothing is known
    assert facts.recall(model, tokenizer, [facts.Person("Arlo Ashgrove", {"colour": "ivory"})]) == 0
