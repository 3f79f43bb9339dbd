"""Surgery out of core against the same change on the live model, and what a broken-off or impossible one leaves behind."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.core.documents import Document
from moesaic.core.errors import BadInput
from moesaic.surgery import operate as engine
from moesaic.surgery.apply import apply
from moesaic.surgery.layer import Change
from moesaic.surgery.measure import measure, relayable
from moesaic.surgery.operate import operate
from moesaic.surgery.shapes import facts_of
from moesaic.surgery.shards import Shards
from moesaic.trace.calibration import calibrate, open_calibration
from moesaic.view import tiny, view

TEXTS = [Document("The quick brown fox jumps over the lazy dog. " * 6, "a"), Document("def f(x):\n    return x + 1\n" * 9, "b")]

REFUSED = {
    "deepseek_v4": "looks experts up in a table",
    "diffusion_gemma": "shares its weights",
    "ernie4_5_vl_moe": "cannot be taken apart",
    "dots3_note": "no one field sets both",
}
"""Architectures of which a block cannot lose experts, and why."""

FEW = ("mixtral", "deepseek_v3", "gpt_oss", "gemma4", "zaya", "nemotron_h", "granitemoe")


def architecture(name):
    return next(a for a in tiny.architectures() if a.name == name)


def pruned_alike(model_class, folder):
    """Halve the experts out of core and live; the largest difference of what both models say."""
    tiny.build(model_class).save_pretrained(folder / "in")
    report = operate(folder / "in", folder / "out", "prune", "random", {"keep": 0.5})
    made, info = model_class.from_pretrained(folder / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    twin = model_class.from_pretrained(folder / "in").eval()
    for block, facts, done in zip(view(twin), facts_of(view(twin)), report.blocks, strict=True):
        keep = [e for e, now in enumerate(done["expert_map"]) if now >= 0]
        assert len(keep) == facts.experts // 2
        apply(block, Change(keep), facts)
    given = tiny.inputs(twin)
    with torch.no_grad():
        outputs = [each(**given).to_tuple()[0] for each in (made.eval(), twin)]
    return float((outputs[0] - outputs[1]).abs().max()), float(outputs[1].abs().max())


@pytest.mark.parametrize("name", FEW)
def test_as_the_live_model(name, tmp_path):
    (model_class,) = tiny.model_classes(architecture(name))
    difference, size = pruned_alike(model_class, tmp_path)
    assert difference <= 1e-6 * size


@pytest.mark.slow
@pytest.mark.parametrize("name", [a.name for a in tiny.architectures() if a.name not in FEW])
def test_as_the_live_model_everywhere(name, tmp_path):
    refused = []
    for number, model_class in enumerate(tiny.model_classes(architecture(name))):
        (tmp_path / str(number)).mkdir()
        try:
            difference, size = pruned_alike(model_class, tmp_path / str(number))
            assert difference <= 1e-5 * size
        except BadInput as error:
            refused.append(str(error))
            assert not (tmp_path / str(number) / "out").exists()
    assert bool(refused) == (name in REFUSED)
    assert all(REFUSED[name] in why for why in refused)


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics") / "s"
    measure("bundled", TEXTS, folder, ("R0", "R1"), by_domain=True)
    return open_calibration(folder)


def test_statistics_layer_by_layer_are_those_of_the_whole_model(statistics, tmp_path):
    whole = calibrate(moesaic.load("bundled"), TEXTS, tmp_path / "whole", tiers="R0,R1", by_domain=True)
    for layer in range(len(whole)):
        for domain in ("a", "b"):
            mine, theirs = statistics.layer(layer, domain).sums, whole.layer(layer, domain).sums
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.slow
def test_which_architectures_are_calibrated_layer_by_layer():
    taken = {a.name: all(relayable(c) for c in tiny.model_classes(a)) for a in tiny.architectures()}
    assert {name for name in FEW if not taken[name]} <= {"gemma4", "zaya"}
    assert sum(taken.values()) >= len(taken) // 2


def test_the_hash_is_of_what_was_found(statistics, tmp_path):
    swapped = Document("The lazy brown fox jumps over the quick dog. " * 6, "a")  # as many tokens
    for name, texts, same in (("same", TEXTS, True), ("other", [swapped, TEXTS[1]], False)):
        measure("bundled", texts, tmp_path / name, ("R0", "R1"), by_domain=True)
        found = open_calibration(tmp_path / name)
        assert (found.hash == statistics.hash) is same and len(statistics.hash) == 16
        assert found.header.progress["tokens"] == statistics.header.progress["tokens"]


def test_nothing_dropped_is_the_same_bytes(statistics, tmp_path):
    operate("bundled", tmp_path / "out", "prune", "reap", {"keep": 1.0}, calibration=statistics)
    before, after = (moesaic.load(each).model.state_dict() for each in ("bundled", tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_stock_result_says_what_became_of_each_expert(statistics, tmp_path):
    report = operate("bundled", tmp_path / "out", "prune", "reap", {"keep": 6}, calibration=statistics, domain="b")
    assert report.stock and report.bytes_after < report.bytes_before
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    own = moesaic.load("bundled").model
    (step,) = json.loads((tmp_path / "out" / "surgery.json").read_text())["steps"]
    assert step["calibration"]["domain"] == "b" and step["calibration"]["hash"] == statistics.hash
    for number, block in enumerate(step["blocks"]):
        keep = [e for e, now in enumerate(block["expert_map"]) if now >= 0]
        scores = torch.tensor(block["scores"])
        assert scores[keep].min() >= scores[[e for e in range(16) if e not in keep]].max()
        ours, theirs = made.model.layers[number].mlp, own.model.layers[number].mlp
        assert torch.equal(ours.gate.weight, theirs.gate.weight[keep])
        assert torch.equal(ours.experts.down_proj, theirs.experts.down_proj[keep])
    assert (tmp_path / "out" / "tokenizer.json").is_file() and "reap" in (tmp_path / "out" / "README.md").read_text()


def test_blocks_of_unequal_size_and_shared_experts_load_after_import(statistics, tmp_path):
    tokenizer = moesaic.load("bundled").tokenizer
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    said = {}
    for name, family, method, options in (
        ("global", "prune", "ean", {"keep": 0.5, "scope": "global"}),
        ("map", "merge", "m_smoe", {"keep": 0.5, "align": "none"}),
        ("repeat", "merge", "m_smoe", {"keep": 0.5, "align": "none", "router": "repeat"}),
    ):
        report = operate("bundled", tmp_path / name, family, method, options, calibration=statistics)
        assert report.stock == (name == "repeat")
        made = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        said[name] = made(ids).logits
        counts = [block.num_experts for block in view(made)]
        assert counts == [block["experts_after"] for block in report.blocks]
        again = operate(tmp_path / name, tmp_path / f"{name}-again", "prune", "random", {"keep": 0.5})
        assert again.stock == report.stock and again.bytes_after < report.bytes_after
    assert torch.allclose(said["map"], said["repeat"], atol=2e-4)
    assert not torch.allclose(said["map"], said["global"], atol=0.1)


def test_broken_off_it_goes_on_and_ends_the_same(statistics, tmp_path, monkeypatch):
    whole = operate("bundled", tmp_path / "whole", "prune", "reap", {"keep": 0.5}, calibration=statistics)
    write, written = Shards.write, []

    def until(self, number, *rest):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(number)
        write(self, number, *rest)

    monkeypatch.setattr(Shards, "write", until)
    with pytest.raises(KeyboardInterrupt):
        operate("bundled", tmp_path / "out", "prune", "reap", {"keep": 0.5}, calibration=statistics)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Shards, "write", lambda self, number, *rest: (written.append(number), write(self, number, *rest)))
    for options, match in (({"keep": 0.5}, "--resume"), ({"keep": 0.75}, "other steps")):
        with pytest.raises(BadInput, match=match):
            operate("bundled", tmp_path / "out", "prune", "reap", options, calibration=statistics, resume="75" in str(options))
    operate("bundled", tmp_path / "out", "prune", "reap", {"keep": 0.5}, calibration=statistics, resume=True)
    assert sorted(written) == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "out.partial").exists()
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert whole.bytes_after < whole.bytes_before


def test_a_result_that_reads_back_otherwise_is_no_result(statistics, tmp_path, monkeypatch):
    own = engine.probe
    spoilt = []

    def once(block, tensors):
        spoilt.append(block.name)
        found = own(block, tensors)
        return found._replace(outputs="other") if len(spoilt) == 2 else found

    monkeypatch.setattr(engine, "probe", once)
    with pytest.raises(BadInput, match=r"differs from the one in memory"):
        operate("bundled", tmp_path / "out", "prune", "reap", {"keep": 0.5}, calibration=statistics)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": 17}, "has 16 experts"),
        ({"keep": 1}, "keep at least 2"),
        ({"keep": 1.5}, "a share above 0"),
        ({"kept": 3}, "no option 'kept'"),
    ],
)
def test_what_cannot_apply_is_said_before_anything_is_written(options, match, statistics, tmp_path):
    with pytest.raises(BadInput, match=match):
        operate("bundled", tmp_path / "out", "prune", "reap", options, calibration=statistics)
    with pytest.raises(BadInput, match="needs calibration"):
        operate("bundled", tmp_path / "out", "prune", "reap", {"keep": 0.5})
    assert list(tmp_path.iterdir()) == []


def test_groups_that_do_not_divide(tmp_path):
    (model_class,) = tiny.model_classes(architecture("deepseek_v3"))
    tiny.build(model_class).save_pretrained(tmp_path / "in")
    with pytest.raises(BadInput, match=r"do not divide into the 2 groups.*keep 4 or 6 of 8"):
        operate(tmp_path / "in", tmp_path / "out", "prune", "random", {"keep": 5})
    with pytest.raises(BadInput, match="keep at least 4"):
        operate(tmp_path / "in", tmp_path / "out", "prune", "random", {"keep": 2})
