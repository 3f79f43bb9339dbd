"""`moesaic trace` and `moesaic traces`: from text to a file and on, and bad input in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moesaic.trace import open_trace


def test_text_to_file(moesaic, tiny_moe, tiny_data, tmp_path):
    out = tmp_path / "a.moetrace"
    result = moesaic("trace", tiny_moe, "--data", tiny_data, "-o", out, "--json", "--context", 32)
    assert result.code == 0, result
    facts = json.loads(result.out)
    trace = open_trace(out).check()
    assert facts["tokens"] == len(trace)
    assert facts["choices"] == len(trace) * 2 * 2 == trace.choices
    assert facts["file_bytes"] == out.stat().st_size
    assert {"file", "layers", "seconds", "overhead"} <= facts.keys()
    assert set(trace.domains) == {"prose", "code"}
    assert trace.lengths_S.max() <= 32
    texts = [json.loads(line)["text"] for line in (tiny_data / "code.jsonl").read_text().splitlines()]
    assert trace.weights_TLK is not None and trace.logits_TLE is None
    code = trace.domain_T == trace.domains.index("code")
    import moesaic as package

    tokenizer = package.load(tiny_moe).tokenizer
    want = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts)
    assert code.sum() == want


def test_generation_is_recorded_step_by_step(moesaic, tiny_moe, tiny_data, tmp_path):
    out = tmp_path / "a.moetrace"
    arguments = ("--data", tiny_data, "-o", out, "--generate", 5, "--prompt-tokens", 8, "--max-bytes", 300, "--logits")
    result = moesaic("trace", tiny_moe, *arguments, "--lookahead", 1, "--hidden", 0.5, "--json")
    assert result.code == 0, result
    trace = open_trace(out)
    prompts = trace.runs_N4[trace.runs_N4[:, 3] > 1]
    assert (prompts[:, 2] == 8).all()
    assert trace.runs_N4[:, 2].sum() == len(trace)
    assert trace.logits_TLE.shape[-1] == 4
    assert trace.ahead_TLAM.shape[1:] == (2, 1, 4)
    assert 0 < len(trace.hidden_rows_H) < len(trace)


def test_table_for_people(moesaic, tiny_moe, tiny_data, tmp_path):
    result = moesaic("trace", tiny_moe, "--data", tiny_data, "-o", tmp_path / "a.moetrace", "--max-bytes", 200)
    for words in ("choices", "per choice", "recording took"):
        assert words in result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "a"], "--data is missing"),
        (["--data", "DATA"], "--out is missing"),
        (["--data", "nowhere", "-o", "a"], "nowhere"),
        (["--data", "DATA", "-o", "none/a"], "none"),
        (["--data", "DATA", "-o", "a", "--context", "4096"], "--context 4096"),
        (["--data", "DATA", "-o", "a", "--lookahead", "9"], "lookahead=9"),
        (["--data", "DATA", "-o", "a", "--batch-size", "0"], "--batch-size 0"),
        (["--data", "empty.txt", "-o", "a"], "no text"),
        (["--data", "DATA", "-o", "a", "--resume", "--generate", "3"], "--resume"),
    ],
)
def test_bad_input(moesaic, tiny_moe, tiny_data, tmp_path, arguments, words):
    (tmp_path / "empty.txt").write_text("")
    result = moesaic("trace", tiny_moe, *[str(tiny_data) if a == "DATA" else a for a in arguments])
    assert words in result.complaint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt"]


def test_dense_models_and_existing_files(moesaic, tiny_moe, tiny_dense, tiny_data, tmp_path):
    assert "not a Mixture-of-Experts" in moesaic("trace", tiny_dense, "--data", tiny_data, "-o", "a").complaint
    (tmp_path / "b").write_text("mine")
    assert "exists" in moesaic("trace", tiny_moe, "--data", tiny_data, "-o", "b").complaint
    assert (tmp_path / "b").read_text() == "mine"


def test_killed_then_resumed_is_the_whole(moesaic, tiny_moe, tiny_data, tmp_path):
    whole, part = tmp_path / "whole.moetrace", tmp_path / "part.moetrace"
    common = [str(tiny_moe), "--data", str(tiny_data), "--context", "16", "--batch-size", "2"]
    assert moesaic("trace", *common, "-o", whole).code == 0
    # The writer flushes every so often; here after each batch, and each batch takes a while.
    code = (
        "import time\nfrom moesaic.trace import corpus, writer\nwriter.FLUSH_TOKENS = 1\nplain = corpus.forward\n"
        "def slow(*a):\n    time.sleep(0.02)\n    return plain(*a)\ncorpus.forward = slow\n"
        "from moesaic.trace import recorder\nrecorder.QUEUED_TOKENS = 1\n"
        f"from moesaic.cli.main import main\nmain(['trace', *{common!r}, '-o', {str(part)!r}])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 60
    while (not part.exists() or part.stat().st_size < 20_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    held = open_trace(part)
    want = open_trace(whole)
    assert 0 < len(held) < len(want)
    assert "other text" in moesaic("trace", *common[:-4], "--context", "24", "-o", part, "--resume").complaint
    assert moesaic("trace", *common, "-o", part, "--resume").code == 0
    trace = open_trace(part)
    assert np.array_equal(trace.tokens_T, want.tokens_T)
    assert np.array_equal(trace.experts_TLK, want.experts_TLK)
    assert "complete" in moesaic("trace", *common, "-o", part, "--resume").complaint


@pytest.fixture
def recorded(moesaic, tiny_moe, tiny_data, tmp_path):
    moesaic("trace", tiny_moe, "--data", tiny_data, "-o", tmp_path / "a.moetrace", "--context", 32)
    return tmp_path / "a.moetrace"


def test_show_slice_merge_convert(moesaic, recorded, tmp_path):
    facts = json.loads(moesaic("traces", "show", recorded, "--json").out)
    trace = open_trace(recorded)
    assert facts["tokens"] == len(trace)
    assert facts["domains"]["code"] == (trace.domain_T == trace.domains.index("code")).sum()
    assert "choices" in moesaic("traces", "show", recorded).out
    for name in trace.domains:
        assert moesaic("traces", "slice", recorded, "--domain", name, "-o", f"{name}.moetrace").code == 0
    assert moesaic("traces", "merge", "code.moetrace", "prose.moetrace", "-o", "both.moetrace", "--json").code == 0
    assert len(open_trace("both.moetrace")) == len(trace)
    assert moesaic("traces", "slice", recorded, "--sequences", "0:2,4", "-o", "some.moetrace").code == 0
    assert open_trace("some.moetrace").lengths_S.tolist() == trace.lengths_S[[0, 1, 4]].tolist()
    assert moesaic("traces", "convert", recorded, "-o", "a.npz").code == 0
    assert moesaic("traces", "convert", "a.npz", "-o", "back.moetrace").code == 0
    assert np.array_equal(open_trace("back.moetrace").experts_TLK, trace.experts_TLK)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "none.moetrace"], "no such trace"),
        (["slice", "a.moetrace", "-o", "b", "--domain", "law"], "no domain 'law'"),
        (["slice", "a.moetrace", "-o", "b", "--sequences", "x"], "--sequences"),
        (["slice", "a.moetrace", "-o", "b", "--sequences", "99999"], "sequences 0 to"),
        (["slice", "a.moetrace"], "--out is missing"),
        (["merge", "a.moetrace", "-o", "a.moetrace", "--overwrite"], "exists"),
        (["convert", "a.moetrace", "-o", "a.csv"], "a.csv"),
        (["convert", "none.npz", "-o", "b.moetrace"], "none.npz"),
    ],
)
def test_bad_edits(moesaic, recorded, tmp_path, arguments, words):
    assert words in moesaic("traces", *arguments).complaint
    assert [p.name for p in tmp_path.iterdir()] == ["a.moetrace"]
