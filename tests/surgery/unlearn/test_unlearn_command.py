"""`moesaic unlearn`: plans, writes a stock checkpoint whole, reports, and refuses what cannot be before training."""

from __future__ import annotations

import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic.cli.main import main
from moesaic.surgery import live
from moesaic.surgery.card import read_history


@pytest.fixture
def call(tmp_path, tiny_moe, capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["unlearn", str(tiny_moe), *map(str, arguments)])
        return stop.value.code, capsys.readouterr()

    return call


SIZES = ("--steps", 2, "--batch-size", 2, "--seq-len", 16, "--context", 32, "--lr", 0.01)


def test_it_plans_and_writes_a_stock_checkpoint_with_recipe_and_card(tmp_path, tiny_data, tiny_moe, call):
    out = tmp_path / "out"
    code, said = call(out, "--forget", tiny_data, "--retain", tiny_data, "--domain", "code", "--plan", "--json", *SIZES)
    planned = json.loads(said.out)
    assert code == 0 and planned["stock"] and "most used" in planned["trains"] and not out.exists()
    code, said = call(
        out, "--loss", "npo", "--forget", tiny_data, "--retain", tiny_data, "--domain", "code", "--eval-forget", tiny_data,
        "--eval-retain", tiny_data, *SIZES, "--json",
    )  # fmt: skip
    done = json.loads(said.out)
    assert code == 0, said.err
    assert done["before"].keys() == done["after"].keys() == done["router_overlap"].keys() == {"forget", "retain"}
    assert done["before"]["forget"]["domains"].keys() == {"code"} and done["before"]["retain"]["domains"].keys() == {"prose"}
    assert done["steps"][0]["steps"] == 2 and len(done["steps"][0]["edited"]) == 1
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.config.model_type == "qwen3_moe"
    before = AutoModelForCausalLM.from_pretrained(tiny_moe)
    changed = {n for n, p in again.named_parameters() if not torch.equal(p, before.state_dict()[n])}
    assert 0 < len(changed) <= 3
    recipe = read_history(out)
    assert [step["method"] for step in recipe] == ["seuf"] and recipe[0]["training"]["steps"] == 2
    assert "unlearn" in (out / "README.md").read_text() and (out / "tokenizer.json").exists()


def test_until_stops_early(tmp_path, tiny_data, call):
    code, said = call(
        tmp_path / "out", "--method", "ga", "--forget", tiny_data, "--steps", 50, "--until", 0.1, *SIZES[2:], "--json"
    )
    assert code == 0 and json.loads(said.out)["steps"][0]["steps"] == 2


def test_bad_input_stops_before_training_and_leaves_nothing(tmp_path, tiny_data, call):
    out = tmp_path / "x"
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    good = ("--forget", tiny_data, "--retain", tiny_data)
    for arguments, says in [
        ((), "OUT is missing"),
        ((out,), "--forget is missing"),
        ((out, "--forget", empty, "--retain", tiny_data), "no text"),
        ((out, *good, "--domain", "poetry"), "no domain 'poetry': it has code, prose"),
        ((out, "--forget", tiny_data), "no retain text"),
        ((out, *good, "--method", "wish"), "no unlearn method"),
        ((out, *good, "--method", "ga", "--loss", "npo"), "seuf's"),
        ((out, *good, "--options", "colour=1"), "its options are"),
        ((out, *good, "--lr", "0"), "too small"),
        ((out, *good, "--seq-len", "512"), "takes 64"),
        ((tiny_data, *good), "not empty"),
    ]:
        code, said = call(*arguments)
        assert code == 2 and says in said.err, (arguments, said.err)
        assert not out.exists() and not list(tmp_path.glob(".*partial"))


def test_a_run_that_dies_while_writing_leaves_no_folder_of_that_name(tmp_path, tiny_data, tiny_moe, call, monkeypatch):
    before = {file.name: file.read_bytes() for file in tiny_moe.iterdir()}

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", dies)
    code, _ = call(tmp_path / "out", "--forget", tiny_data, "--retain", tiny_data, *SIZES)
    assert code == 130
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial"))
    assert before == {file.name: file.read_bytes() for file in tiny_moe.iterdir()}


def test_what_does_not_come_back_as_it_was_is_not_written(tmp_path, tiny_moe):
    model = AutoModelForCausalLM.from_pretrained(tiny_moe)
    save = model.save_pretrained

    def spoilt(folder):
        save(folder)
        with torch.no_grad():
            model.model.norm.weight.add_(1)

    model.save_pretrained = spoilt
    with pytest.raises(live.BadInput, match="not what it was"):
        live.write(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial"))
