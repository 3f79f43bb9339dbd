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
