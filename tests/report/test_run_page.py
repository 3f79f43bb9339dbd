"""The page: what it holds, and how it behaves in a real browser without a network."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from moesaic.core.errors import BadInput
from moesaic.core.files import write_atomically
from moesaic.report.run_page import MOST_TOKENS, Layer, RunPage

spec = importlib.util.spec_from_file_location("browser", Path(__file__).with_name("browser.py"))
browser = importlib.util.module_from_spec(spec)
spec.loader.exec_module(browser)

needs_browser = pytest.mark.skipif(browser.find() is None, reason="no Chromium here (apt-get install chromium)")

HOSTILE = ["The", " </script><script>boom()</script>", " <!--", " 🙂\n", "", "é", " & end", "\u2028"]


def page(tokens=HOSTILE, experts=4, layers=3, k=2, seed=0) -> RunPage:
    random = np.random.default_rng(seed)
    routed = len(tokens) - 1
    made = []
    for layer in range(layers):
        ids = np.stack([random.permutation(experts)[:k] for _ in range(routed)])
        weights = random.random((routed, k)) + 0.1
        weights /= weights.sum(1, keepdims=True)
        load = np.bincount(ids.ravel(), minlength=experts)
        used = int((load > 0).sum())
        made.append(Layer(layer, experts, ids, weights, load.tolist(), used, float(load.max() / load.mean()), 0.9))
    facts = [("experts per layer", str(experts), f"top {k}"), ("bytes", "1 kB", "")]
    return RunPage(
        "a <b>model</b>", "SomeForCausalLM", "intro", facts, list(tokens), routed, made, "made", "moesaic run x",
        [(0, "prompt"), (3, "answer")],
    )  # fmt: skip


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])


def test_data_survives_and_cannot_leave_its_element():
    text = page().html()
    found = data_of(text)
    assert found["tokens"] == HOSTILE
    assert found["parts"] == [4]
    assert text.count("<script") == 2
    assert "<title>moesaic run: a &lt;b&gt;model&lt;/b&gt;</title>" in text
    assert not re.search(r"""(src|href)\s*=|@import|url\(|https?://""", text.replace(text[text.index("<script id") :], ""))


def test_choices_are_stored_as_bytes_or_words():
    import base64

    for experts, kind in ((4, np.uint8), (600, "<i2")):
        made = page(experts=experts)
        layer = data_of(made.html())["layers"][0]
        ids = np.frombuffer(base64.b64decode(layer["ids"]), kind).reshape(-1, 2)
        assert np.array_equal(ids, made.layers[0].experts_TK)
        weights = np.frombuffer(base64.b64decode(layer["weights"]), np.uint8).reshape(-1, 2) / 255 * layer["scale"]
        np.testing.assert_allclose(weights, made.layers[0].weights_TK, atol=layer["scale"] / 500)


def test_a_long_run_is_cut_to_its_end_and_stays_light():
    tokens = [f" w{i}" for i in range(MOST_TOKENS + 100)]
    made = page(tokens, experts=64, layers=8, k=4)
    text = made.html()
    found = data_of(text)
    assert found["tokens"] == tokens[100:]
    assert found["routed"] == MOST_TOKENS - 1
    assert f"last {MOST_TOKENS:,} of {MOST_TOKENS + 100:,} tokens" in found["intro"]
    assert len(page([f" w{i}" for i in range(200)], 16, 6, 2).html()) < 60_000


def test_writing_is_whole_or_not_at_all(tmp_path):
    target = tmp_path / "p.html"
    write_atomically(target, "one \ud800 surrogate")
    assert target.read_text() == "one ? surrogate"
    link = tmp_path / "link.html"
    link.symlink_to(target)
    write_atomically(link, "two")
    assert link.is_symlink()
    assert target.read_text() == "two"
    with pytest.raises(BadInput, match=r"gone.p\.html"):
        write_atomically(tmp_path / "gone" / "p.html", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.html", "p.html"]


@needs_browser
def test_in_a_browser(tmp_path):
    """No console errors, no outside requests, hostile text is text, and every control does what it says."""
    file = write_atomically(tmp_path / "p.html", page().html())
    with browser.Browser() as chrome:
        chrome.open(file)
        assert chrome.problems == []
        assert chrome.requests == [file.as_uri()]
        assert chrome.run("document.querySelector('#title').firstChild.data") == "a <b>model</b>"
        shown = chrome.run("[...document.querySelectorAll('#text span.t')].map(s => s.textContent).join('')")
        assert shown == "".join(HOSTILE).replace("\n", "↵\n")
        tile = "getComputedStyle(document.querySelector('#text span.t')).backgroundColor"
        colours = []
        for layer in range(3):
            chrome.run(
                f"(e => {{ e.value = {layer}; e.dispatchEvent(new Event('input')); }})(document.querySelector('#layer'))"
            )
            assert chrome.run("document.querySelector('#which').textContent").startswith(f"{layer} ")
            assert chrome.run("document.querySelector('tr.on th').textContent") == f"layer {layer}"
            colours.append(chrome.run(tile))
        firsts = [int(np.argmax(layer.weights_TK[0])) for layer in page().layers]
        firsts = [int(layer.experts_TK[0][k]) for layer, k in zip(page().layers, firsts, strict=True)]
        assert len(set(colours)) == len(set(firsts))
        load = page().layers[2].load
        chips = chrome.run("[...document.querySelectorAll('.chip')].map(c => c.title)")
        assert chips == [f"expert {e}: {n} of {sum(load)} choices" for e, n in enumerate(load)]
        chrome.run("document.querySelectorAll('.chip')[1].click()")
        hits = chrome.run("[...document.querySelectorAll('#text span.t')].map(s => s.classList.contains('hit'))")
        assert hits == [1 in row for row in page().layers[2].experts_TK] + [False]
        chrome.run("document.querySelector('#by-weight').click()")
        assert chrome.run(tile) not in colours
        chrome.run("document.querySelectorAll('#text span.t')[0].click()")
        assert chrome.run("document.querySelectorAll('#path tr').length") == 3
        hover = "new PointerEvent('pointermove', {bubbles: true, clientX: 50, clientY: 50})"
        chrome.run(f"document.querySelectorAll('#text span.t')[0].dispatchEvent({hover})")
        assert "expert" in chrome.run("document.querySelector('#tip').textContent")
        assert chrome.problems == []
        assert chrome.requests == [file.as_uri()]


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_narrow_screens_do_not_scroll_sideways(tmp_path, dark):
    tokens = [f" word{i}" for i in range(120)]
    file = write_atomically(tmp_path / "p.html", page(tokens, 64, 12, 4).html())
    with browser.Browser(width=390, height=800, dark=dark) as chrome:
        chrome.open(file)
        assert chrome.run("document.documentElement.scrollWidth") <= 390
        ink, paper = (chrome.run(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
        light = [sum(map(float, re.findall(r"[\d.]+", colour)[:3])) for colour in (ink, paper)]
        assert (light[0] > light[1]) == dark


@needs_browser
def test_a_dense_model_has_a_plain_page(tmp_path):
    made = page()
    made.layers, made.routed = [], 0
    file = write_atomically(tmp_path / "p.html", made.html())
    with browser.Browser() as chrome:
        chrome.open(file)
        assert chrome.problems == []
        assert not chrome.run("document.querySelector('#heat-card').checkVisibility()")
        assert "dense" in chrome.run("document.querySelector('#how').textContent")
