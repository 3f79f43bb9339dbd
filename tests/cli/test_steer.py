"""`moesaic steer`: the files it writes are those that `--steer` takes; what is wrong is named."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from moesaic.cli.run import app as run_app
from moesaic.cli.steer import app
from moesaic.core.errors import BadInput


def called(arguments, application=app):
    result = CliRunner().invoke(application, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "a.txt").write_text("def f(x): return\n\nclass Router:\n")
    (tmp_path / "b.jsonl").write_text('{"text": "The router scores every expert."}\n{"text": "Ein Modell besteht"}\n')
    return tmp_path


def test_find_then_run(tiny_moe, prompts):
    out = prompts / "map.json"
    files = ["--prompts-with", str(prompts / "a.txt"), "--prompts-without", str(prompts / "b.jsonl")]
    found = called(["find", str(tiny_moe), *files, "-o", str(out), "--top", "3", "--json"])
    assert found["prompts"] == {"with": 2, "without": 2}
    assert len(found["top"]) == 3
    assert found["top"][0]["score"] >= found["top"][2]["score"]
    common = [str(tiny_moe), "def f", "--max-new-tokens", "8", "--temperature", "0", "--no-page", "--json"]
    plain = called(common, run_app)
    steered = called([*common, "--steer", f"mote:map={out},top=3", "--routing", '{"threshold": 0.1}'], run_app)
    assert plain["exact"] and not steered["exact"]
    assert steered["text"] != plain["text"]
    off = {(row["block"], row["expert"]) for row in found["top"]}
    for layer in steered["load"]:
        assert all(layer["load"][e] == 0 for block, e in off if block.endswith(f".{layer['layer']}.mlp"))


def test_the_pass_beside_an_answer_is_not_its_load(tiny_moe):
    common = [str(tiny_moe), "def f", "--max-new-tokens", "6", "--temperature", "0", "--no-page", "--json"]
    plain, steered = called(common, run_app), called([*common, "--steer", "scmoe:beta=0"], run_app)
    assert steered["text"] == plain["text"]
    assert [layer["load"] for layer in steered["load"]] == [layer["load"] for layer in plain["load"]]


def test_references_then_run(tiny_moe, tmp_path):
    rows = [{"prompt": f"the router {word}", "answer": "a", "choices": ["a", "b"]} for word in ("scores", "keeps", "has", "is")]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = tmp_path / "refs.safetensors"
    made = called(["references", str(tiny_moe), "--data", str(tmp_path / "q.jsonl"), "-o", str(store), "--json"])
    assert made["right"] <= made["read"] == 4
    common = [str(tiny_moe), "the router", "--max-new-tokens", "4", "--temperature", "0", "--no-page", "--json"]
    steered = called([*common, "--steer", f"c3po:store={store},alpha=0,leak=1"], run_app)
    assert steered["steer_notes"]["c3po_neighbours"] >= 1


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_sdm_network_then_run(tiny_moe, tmp_path):
    """Right units are colons, wrong ones equals signs: what is held out is told apart, and an answer is judged by units."""
    words = ("scores", "keeps", "has", "is", "and", "routes", "of", "the")
    rows = [
        {"prompt": f"{a} {b}", "text": end, "label": name}
        for a in words for b in words for end, name in ((":::::", "right"), ("=====", "wrong"))
    ]  # fmt: skip
    store, head = tmp_path / "units.safetensors", tmp_path / "head.safetensors"
    options = ["-o", str(store), "--head", str(head), "--splits", "1", "--alpha", "0.6", "--head-lr", "1e-2", "--lr", "1e-2"]
    given = ["sdm-network", str(tiny_moe), "--data", lines(tmp_path / "u.jsonl", rows)]
    made = called([*given, *options, "--json"])
    assert made["rows"] == 128 and made["held_out"] == 32 and made["accuracy"] >= 0.9
    assert made["losses"][-1] < made["losses"][0]
    common = [str(tiny_moe), "the router", "--max-new-tokens", "6", "--temperature", "0", "--no-page", "--json"]
    plain = called(common, run_app)
    steered = called([*common, "--steer", f"sdm_network:store={store},head={head},unit=3"], run_app)
    note = steered["steer_notes"]["sdm_network"]
    assert plain["text"].startswith(steered["text"]) and note["units"] <= 2
    assert sum(steered["load"][0]["load"]) > 0
    assert (note["units"] == 2) == (steered["text"] == plain["text"])
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "text": "b", "label": "good"}\n')
    with pytest.raises(BadInput, match="two files"):
        called([*given, "-o", str(head), "--head", str(head)])
    with pytest.raises(BadInput, match="a row is"):
        called(["sdm-network", str(tiny_moe), "--data", str(tmp_path / "bad.jsonl"), *options])


def test_sdm_then_run(tiny_moe, tmp_path):
    """Two kinds of text, told apart by their last words; the store says so of a prompt, and what is far is not answered."""
    words = ("scores", "keeps", "has", "is", "and", "routes", "of", "the", "an", "expert")
    rows = [
        {"text": f"{a} {b} {end}", "label": name}
        for a in words for b in words for end, name in ((":::::", "colons"), ("=====", "equals"))
    ]  # fmt: skip
    store = tmp_path / "sdm.safetensors"
    data = lines(tmp_path / "d.jsonl", rows)
    options = ["--splits", "2", "--epochs", "40", "--lr", "1e-2", "--alpha", "0.6", "--json"]
    made = called(["sdm", str(tiny_moe), "--data", data, "-o", str(store), *options])
    assert made["classes"] == {"colons": 100, "equals": 100} and made["held_out"] == 50
    assert made["can_admit"] and made["accuracy"] > 0.9 and 0 < made["coverage"] <= 1 and made["admitted_accuracy"] > 0.9
    common = ["--max-new-tokens", "4", "--temperature", "0", "--no-page", "--json", "--steer", f"sdm:store={store}"]
    near = [called([str(tiny_moe), f"{a} is =====", *common], run_app) for a in ("scores", "has", "the")]
    far = called([str(tiny_moe), "нейронные", *common], run_app)
    assert [one["steer_notes"]["sdm"]["class"] for one in near].count("equals") >= 2
    assert far["steer_notes"]["sdm"]["admitted"] is False and far["tokens"] == 0 and far["stopped"] == "abstained"


def test_sdm_of_right_and_wrong_answers(tiny_moe, tmp_path):
    rows = [{"prompt": f"the router {i}", "answer": "ab"[i % 2], "choices": ["a", "b"]} for i in range(40)]
    made = called(
        [
            "sdm",
            str(tiny_moe),
            "--data",
            lines(tmp_path / "q.jsonl", rows),
            "-o",
            str(tmp_path / "s"),
            "--splits",
            "1",
            "--json",
        ]
    )
    assert set(made["classes"]) == {"right", "wrong"} and sum(made["classes"].values()) == 40


def test_mogu_then_run(tiny_moe, tmp_path):
    (tmp_path / "good.txt").write_text("".join(f"the router {i}\n" for i in range(8)))
    bad = [{"prompt": f"break it {i}", "affirm": "yes", "reject": "no, no"} for i in range(8)]
    adapter = tmp_path / "mogu.safetensors"
    files = ["--harmless", str(tmp_path / "good.txt"), "--risky", lines(tmp_path / "bad.jsonl", bad), "-o", str(adapter)]
    options = ["--epochs", "3", "--gate-epochs", "12", "--lr", "1e-2", "--gate-lr", "1e-2", "--json"]
    made = called(["mogu", str(tiny_moe), *files, *options])
    assert made["rows"] == {"harmless": 6, "risky": 6} and made["held_out"] == {"harmless": 2, "risky": 2}
    assert all(last < first for first, last in made["losses"].values()), made["losses"]
    assert made["auc"] > 0.9 and made["reject_mixed"] < made["reject_base"]
    common = [str(tiny_moe), "break it 9", "--max-new-tokens", "8", "--temperature", "0", "--no-page", "--json"]
    plain, steered = called(common, run_app), called([*common, "--steer", f"mogu:adapter={adapter}"], run_app)
    assert steered["tokens"] == plain["tokens"] and steered["text"] != plain["text"]


@pytest.mark.parametrize(
    ("arguments", "row", "message"),
    [
        (["sdm", "--data", "FILE"], {"text": "a"}, "FILE:1: a row is"),
        (["sdm", "--data", "FILE"], {"text": "a", "label": "x"}, "every row is 'x'"),
        (["sdm", "--data", "FILE", "--alpha", "0.4"], {}, "--alpha 0.4"),
        (["sdm", "--data", "FILE"], [{"text": "a", "label": "x"}, {"prompt": "a", "answer": "b"}], "FILE:2: a row is"),
        (["sdm", "--data", "FILE"], [{"text": "a", "label": "x"}, {"text": "a", "label": "y"}], "class 'x' has 1 rows"),
        (["mogu", "--harmless", "FILE", "--risky", "FILE"], {"prompt": "a", "reject": 3}, "FILE:1: a row is"),
        (["mogu", "--harmless", "FILE", "--risky", "FILE"], {"prompt": "a"}, "give more"),
        (["mogu", "--harmless", "FILE", "--risky", "/none.jsonl"], {"prompt": "a"}, "--risky /none.jsonl: No such file"),
        (["mogu", "--harmless", "FILE", "--risky", "FILE", "--lr", "0"], {"prompt": "a"}, "--lr 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt_is_named(tiny_moe, arguments, row, message, tmp_path):
    file = lines(tmp_path / "FILE.jsonl", row if isinstance(row, list) else [row])
    name, *rest = [file if word == "FILE" else word for word in arguments]
    with pytest.raises(BadInput, match=message.replace("FILE", "FILE.jsonl")):
        called([name, str(tiny_moe), *rest, "-o", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["find", "MODEL"], "give --prompts-with"), (["find", "MODEL", "--by", "love"], "weights or counts"),
        (["find", "MODEL", "--prompts-with", "/none", "--prompts-without", "/none"], "no such file"),
        (["references", "MODEL", "--data", "/none"], "No such file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tiny_moe, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=message):
        called([str(tiny_moe) if word == "MODEL" else word for word in arguments])


def test_run_says_what_is_wrong(tiny_moe):
    for options, message in (
        (["--routing", "{"], "no JSON"), (["--routing", "[]"], "give an object"), (["--steer", "mote"], "give off, on or map"),
        (["--steer", "scmoe", "--verify", "--resident", "0.5"], "leave --steer"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            called([str(tiny_moe), "x", "--no-page", *options], run_app)


@pytest.mark.parametrize("steer", ["scmoe:beta=2,alpha=0.001", 'mote:off={"0": [0, 1]}', "naee_skip:beta=0.9"])
def test_experts_on_disk_are_steered_alike(tiny_moe, steer):
    common = [str(tiny_moe), "def f", "--max-new-tokens", "6", "--temperature", "0", "--no-page", "--json", "--steer", steer]
    resident, streamed = called(common, run_app), called([*common, "--resident", "0.5"], run_app)
    assert streamed["text"] == resident["text"]
    assert streamed["load"] == resident["load"]


@pytest.mark.parametrize("where", [["--quantize", "int8"], ["--resident", "0.5"]])
def test_what_needs_gradients_needs_experts_that_have_them(tiny_moe, where):
    with pytest.raises(BadInput, match="no backward"):
        called([str(tiny_moe), "def f", "--no-page", "--json", *where, "--steer", "rewiring"], run_app)


@pytest.mark.parametrize(
    "routing",
    ['{"k": "a"}', '{"k": 99}', '{"mask": 3}', '{"without": ["x"]}', '{"bias": "no"}', '{"logits": {"0": [1]}}', '{"rank": []}',
     '{"threshold": "big"}', '{"steer": {"mote": {"off": 3}}}', '{"steer": {"scmoe": {"beta": "x"}}}',
     '{"steer": {"rewiring": {"steps": [1]}}}', '{"steer": {"sdm": {"store": 4}}}', '{"steer": {"mogu": {"adapter": []}}}',
     '{"steer": {"naee_skip": {"beta": "x"}}}', '{"steer": {"scmoe": 3}}', '{"force": [1.5]}', '{"k": 1.5}'],
)  # fmt: skip
def test_values_of_the_wrong_kind_are_named(tiny_moe, routing):
    with pytest.raises(BadInput):
        called([str(tiny_moe), "x", "--no-page", "--json", "--routing", routing], run_app)
