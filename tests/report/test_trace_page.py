"""The page of a trace: what it is told is what was recorded, and a real browser draws it without error or network."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from moesaic.core.errors import BadInput
from moesaic.report import trace_page
from moesaic.trace.edit import save
from moesaic.trace.file import from_arrays

spec = importlib.util.spec_from_file_location("browser", Path(__file__).with_name("browser.py"))
browser = importlib.util.module_from_spec(spec)
spec.loader.exec_module(browser)

needs_browser = pytest.mark.skipif(browser.find() is None, reason="no Chromium here (apt-get install chromium)")


def make(experts=8, layers=3, slots=2, tokens=600, weights=True, named=True, domains=("a", "</script><b>", "c")):
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :slots] for _ in range(layers)], 1)
    third = tokens // 3
    return from_arrays(
        ids, experts, lengths=[third, third, tokens - 2 * third], domains=domains, domain_S=[0, 1, 2][: len(domains)] or None,
        weights_TLK=rng.dirichlet(np.ones(slots), (tokens, layers)) if weights else None,
        tokens_T=rng.integers(0, 9, tokens) if named else None, expert_bytes=1000,
    )  # fmt: skip


WORDS = ["<script>boom()</script>", " the", "\n", "", "é", "🙂", " -->", "\u2028", " end"]


def texts(ids):
    return [WORDS[i] for i in ids]


SHARES = (0.1, 0.5, 1.0)
CACHES = [{"policy": p, "cache_share": s, "hit_rate": s**0.5, "exact": True} for p in ("lru", "belady") for s in SHARES]


def page(trace, tmp_path, words=texts):
    data = trace_page.gather(trace, words, CACHES)
    text = trace_page.html(data, "a <b>model</b>", [("tokens", "600")], "made", "moesaic report x")
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    return path, text


def data_of(text):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])


def test_the_page_holds_what_was_recorded(tmp_path):
    trace = make()
    _, text = page(trace, tmp_path)
    data = data_of(text)
    counts = np.frombuffer(base64.b64decode(data["counts"]), "<f4").reshape(3, 8)
    for layer in range(3):
        assert counts[layer].tolist() == np.bincount(trace.experts_TLK[:, layer].ravel(), minlength=8).tolist()
    apart = np.frombuffer(base64.b64decode(data["domain_counts"]), "<f4").reshape(3, 3, 8)
    assert np.array_equal(apart.sum(0), counts)
    sample = data["samples"][0]
    ids = np.frombuffer(base64.b64decode(sample["ids"]), "<i2").reshape(-1, 3, 2)
    assert np.array_equal(ids, trace.experts_TLK[: len(ids)])
    weights = np.frombuffer(base64.b64decode(sample["weights"]["data"]), np.uint8) / 255 * sample["weights"]["most"]
    assert np.allclose(weights.reshape(ids.shape), trace.weights_TLK[: len(ids)], atol=0.003)
    assert sample["tokens"] == texts(trace.tokens_T[: len(ids)])
    assert [d["tokens"] for d in data["domains"]] == [200, 200, 200]


def test_words_of_an_expert_are_those_sent_to_it(tmp_path):
    """Token v goes to expert v alone: each list begins with its own token, all of whose choices go there."""
    tokens = np.arange(900) % 8
    trace = from_arrays(tokens[:, None, None], 8, tokens_T=tokens)
    found = trace_page.words(trace, lambda ids: [f"w{i}" for i in ids])
    assert [lists[0] for lists in found[0]] == [[f"w{e}", 1.0] for e in range(8)]
    assert all(len(lists) == 1 for lists in found[0])


def test_text_cannot_leave_the_data(tmp_path):
    _, text = page(make(), tmp_path)
    assert text.count("<script") == 2
    assert "<title>moesaic report: a &lt;b&gt;model&lt;/b&gt;</title>" in text
    outside = text.replace(text[text.index("<script id") :], "")
    assert not re.search(r"""(src|href)\s*=|@import|url\(|https?://""", outside)


CASES = {
    "plain": {},
    "no weights, no tokens": {"weights": False, "named": False},
    "no domains": {"domains": ()},
    "many experts": {"experts": 300, "layers": 12, "tokens": 300, "slots": 6},
    "one layer, one slot": {"layers": 1, "slots": 1, "experts": 3, "tokens": 60},
    "short": {"tokens": 6},
}


@needs_browser
@pytest.mark.parametrize("name", CASES)
def test_a_browser_draws_it(name, tmp_path):
    trace = make(**CASES[name])
    path, _ = page(trace, tmp_path, texts if trace.tokens_T is not None else None)
    with browser.Browser() as window:
        window.open(path)
        last = len(trace.layers) - 1
        window.run(f"show({last})")
        assert window.run("document.getElementById('which').textContent") == f"{last}  ({last + 1} of {last + 1})"
        assert window.problems == []
        assert all(address.startswith("file:") for address in window.requests)
        assert len(window.requests) == 1
        assert window.run("document.documentElement.scrollWidth <= innerWidth")
        assert window.run("document.querySelectorAll('#caches svg path').length") >= 4
        assert window.run("document.querySelectorAll('#text span.t').length") > 0
        assert window.run("getComputedStyle(document.getElementById('word-card')).display") == (
            "none" if trace.tokens_T is None else "block"
        )


@needs_browser
def test_pictures_show_the_numbers(tmp_path):
    """An expert that one layer always chooses is the darkest cell; its row can be clicked; a domain changes the picture."""
    ids = np.tile(np.arange(8) % 4, (400, 2, 1)).transpose(0, 1, 2)[:, :, :2].copy()
    ids[:, 1] = [5, 6]
    ids[:200, 0] = [1, 2]
    trace = from_arrays(ids, 8, lengths=[200, 200], domains=["x", "y"], domain_S=[0, 1], expert_bytes=10)
    path, _ = page(trace, tmp_path, None)
    shade = "(r, c) => document.querySelector('#load canvas').getContext('2d').getImageData(c, r, 1, 1).data.join()"
    with browser.Browser(width=700, dark=True) as window:
        window.open(path)
        assert window.run(f"({shade})(1, 5)") == window.run(f"({shade})(1, 6)") != window.run(f"({shade})(1, 0)")
        before = window.run(f"({shade})(0, 0)")
        window.run("document.querySelectorAll('#load-domain button')[2].click()")
        assert window.run(f"({shade})(0, 0)") != before
        window.run("document.querySelectorAll('#balance tr')[1].click()")
        assert window.run("document.getElementById('which').textContent").startswith("0 ")
        assert window.run("document.documentElement.scrollWidth <= innerWidth")
        assert window.problems == []


def test_command(tmp_path, monkeypatch, capsys):
    from moesaic.cli.main import main

    monkeypatch.chdir(tmp_path)
    save(make(), tmp_path / "a.moetrace")
    with pytest.raises(SystemExit) as stop:
        main(["report", "a.moetrace", "--json", "--shares", "0.5,1", "--policies", "lru"])
    assert not stop.value.code
    facts = json.loads(capsys.readouterr().out)
    assert facts["page"] == "a.html" and facts["texts"] is False
    data = data_of((tmp_path / "a.html").read_text())
    assert "does not name its model" in data["intro"]
    assert [row["cache_share"] for row in data["caches"]] == [0.5, 1.0]
    assert data["caches"][1]["hit_rate"] > data["caches"][0]["hit_rate"]


def test_the_bundled_models_texts_are_read(tmp_path):
    import torch

    import moesaic
    from moesaic.cli.report import reader

    loaded = moesaic.load("bundled")
    ids = loaded.tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    with moesaic.trace(loaded, name="bundled") as recorder, torch.inference_mode():
        loaded.model(input_ids=ids)
    words, told = reader(None, recorder.result)
    assert "".join(words(recorder.result.tokens_T.tolist())) == "Once upon a time"
    assert told == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.moetrace"], "no such trace"),
        (["a.moetrace", "-o", "none/x.html"], "none"),
        (["a.moetrace", "-o", "a.moetrace"], "is the trace itself"),
        (["a.moetrace", "--shares", "2"], "--shares '2'"),
        (["a.moetrace", "--shares", "x"], "--shares 'x'"),
        (["a.moetrace", "--model", "nowhere/at/all"], "nowhere"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, arguments, words):
    from moesaic.cli.main import main

    monkeypatch.chdir(tmp_path)
    save(make(), tmp_path / "a.moetrace")
    with pytest.raises(SystemExit) as stop:
        main(["report", *arguments])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.moetrace"]


def test_another_vocabulary_is_refused(tiny_tokenizer, tiny_moe, tiny_dense):
    from moesaic.cli.report import reader
    from moesaic.trace.file import Header, Trace

    trace = make()
    header = Header(trace.layers, model="", tokenizer="0123456789abcdef")
    with pytest.raises(BadInput, match="not the one that"):
        reader(str(tiny_moe), Trace(header, trace.columns))
