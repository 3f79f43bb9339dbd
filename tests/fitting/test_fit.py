"""`moesaic fit` on the bundled model, from a text to a folder that says what it is."""

import json

import pytest

import moesaic
from moesaic.core.errors import BadInput
from moesaic.core.sizes import parse_bytes
from moesaic.fitting.fit import NOTE, fit, halves


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tale.txt"
    path.write_text("Once upon a time there was a little fox who lived in the wood. He saw the moon and was glad. " * 30)
    return path


def test_one_document_is_cut_in_its_middle(text, tmp_path):
    learn, test = halves(str(text), None)
    assert learn[0].text + test[0].text == text.read_text()
    (tmp_path / "empty.txt").write_text("  ")
    with pytest.raises(BadInput, match="too little text"):
        halves(str(tmp_path / "empty.txt"), None)


def test_a_plan_is_only_predicted(text):
    report = fit("bundled", parse_bytes("9MiB", ""), data=str(text), predict_only=True)
    assert report["rows"] == [] and report["chosen"] is None
    assert {"streamed", "4 bits"} <= {row["plan"] for row in report["candidates"]}


def test_what_cannot_fit_is_said_with_numbers(tmp_path):
    with pytest.raises(BadInput, match=r"1 MiB of memory: what is no expert takes 4\.1\d MiB"):
        fit("bundled", 1 << 20)
    with pytest.raises(BadInput, match="a text to measure it on"):
        fit("bundled", 1 << 30, quality=0.1)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_behind_and_a_folder_of_other_plans_is_not_used(text, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fit("bundled", 9 << 20, data=str(text), predict_only=True)
    with pytest.raises(BadInput, match="1 MiB of memory"):
        fit("bundled", 1 << 20)
    assert list(tmp_path.iterdir()) == []
    work = tmp_path / "work"
    fit("bundled", 9 << 20, data=str(text), predict_only=True, work=work)
    fit("bundled", 10 << 20, data=str(text), predict_only=True, work=work)
    for other in ({"data": None}, {"max_bytes": 100}):
        with pytest.raises(BadInput, match="something else than plans of this model and text"):
            fit("bundled", 9 << 20, **{"data": str(text), "predict_only": True, "work": work, **other})
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    with pytest.raises(BadInput, match="something else"):
        fit("bundled", 9 << 20, predict_only=True, work=mine)
    assert (mine / "letter.txt").read_text() == "dear"


@pytest.mark.slow
def test_the_chosen_plan_is_measured_and_written(text, tmp_path):
    out = tmp_path / "out"
    report = fit("bundled", 9 << 20, data=str(text), quality=0.05, most=2, new_tokens=8, out=out)
    rows = {row["plan"]: row for row in report["rows"]}
    assert "streamed" in rows and rows["streamed"]["exact"]
    assert all(row["memory_bytes"] <= 9 << 20 and row["tokens_per_second"] > 0 for row in rows.values())
    assert report["chosen"] in rows
    note = json.loads((out / NOTE).read_text())
    assert note["chosen"] == report["chosen"]
    model, tokenizer = moesaic.load(out)
    assert model.generate(**tokenizer("Once upon", return_tensors="pt"), max_new_tokens=3).shape[1] > 3


@pytest.mark.slow
def test_experts_get_their_own_bits_and_the_records_hold_them(text, tmp_path):
    from moesaic.fitting.plans import Candidate
    from moesaic.fitting.trial import Trials
    from moesaic.store.packed import read_packed
    from moesaic.surgery.measure import measure
    from moesaic.surgery.planning import open_plan

    learn, _ = halves(str(text), None)
    seen = []

    def calibrate(folder):
        seen.append(folder)
        return measure(folder, learn, tmp_path / f"statistics-{len(seen)}", ("R0", "R1"))

    model = open_plan("bundled").source
    trials = Trials(model, tmp_path, calibrate, tmp_path / "test.jsonl", "Once", 4, None, 1)
    for method, experts in (("", 16), ("prune reap", 8)):
        folder = trials.folder(Candidate(method, 0.5 if method else 1.0, 3))
        bits = [bits for block in read_packed(folder).contents.blocks for bits in block.bits_E]
        assert len(bits) == 6 * experts and set(bits) <= {2, 4, 8, 16}
        assert len(set(bits)) > 1 and sum(bits) <= 3 * len(bits)
        assert not list(tmp_path.glob("*.rounded"))
    assert seen == [model, model, tmp_path / "reap-0.5"]  # the pruned model is asked anew
