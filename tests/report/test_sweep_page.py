"""The page of a sweep: what it holds, and how it behaves in a real browser without a network."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from moesaic.report.sweep_page import COLUMNS, sweep_page, write_page

spec = importlib.util.spec_from_file_location("browser", Path(__file__).with_name("browser.py"))
browser = importlib.util.module_from_spec(spec)
spec.loader.exec_module(browser)

needs_browser = pytest.mark.skipif(browser.find() is None, reason="no Chromium here (apt-get install chromium)")


def summary():
    cells, rows = [], []
    for i, (name, group) in enumerate([("topk", "routers"), ("</script><b>x", "routers"), ("dense", "twins")]):
        curve = {
            "loss": [[s, 5.0 - 0.02 * s + i] for s in range(1, 61)],
            "valid": [[30, 4.0 + i], [60, 3.5 + i]],
            "max_vio": [],
        }
        if name != "dense":
            curve["max_vio"] = [[s, 1.0 / s] for s in range(1, 61)]
        cells.append({"name": name, "group": group, "seed": 0, "status": "done", "curve": curve})
        row = {key: float(10 - i) for key, _ in COLUMNS}
        rows.append(
            {**row, "name": name, "group": group, "seeds": 1, "errors": [], "sd": {"bits_per_byte": 0.25} if not i else {}}
        )
    empty = dict.fromkeys((key for key, _ in COLUMNS))
    rows.append({**empty, "name": "bad", "group": "twins", "seeds": 0, "errors": ["k=9 is <too> many"], "sd": {}})
    cells.append({"name": "bad", "group": "twins", "seed": 0, "status": "failed", "error": "k=9"})
    return {"rows": rows, "cells": cells, "missing": [f"m{i}-s0" for i in range(22)]}


def test_data_cannot_leave_its_element():
    text = sweep_page("a <b>sweep</b>", summary())
    assert text.count("<script") == 2
    assert "<title>a &lt;b&gt;sweep&lt;/b&gt;</title>" in text
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])
    assert [row["name"] for row in data["rows"]] == ["topk", "</script><b>x", "dense", "bad"]
    assert len(data["cells"]) == 3, "a failed cell has no curve"
    assert data["intro"].startswith("3 cells. Not there yet: m0-s0, ") and data["intro"].endswith("and 2 more.")
    assert not re.search(r"""(src|href)\s*=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)""", text)


@needs_browser
def test_in_a_browser(tmp_path):
    """No console errors, no outside requests, hostile names are text, and every control does what it says."""
    file = write_page(tmp_path / "p.html", "a <b>sweep</b>", summary())
    with browser.Browser() as chrome:
        chrome.open(file)
        assert chrome.problems == [] and chrome.requests == [file.as_uri()]
        assert chrome.run("document.querySelector('#title').textContent") == "a <b>sweep</b>"
        names = "[...document.querySelectorAll('tbody tr')].map(r => r.dataset.name)"
        assert chrome.run(names) == ["dense", "</script><b>x", "topk", "bad"], "lowest bits per byte first, failures last"
        assert "k=9 is <too> many" in chrome.run("document.querySelector('td.bad').textContent")
        assert "10 ± 0.25" in chrome.run("document.querySelector('tr[data-name=topk]').textContent")
        chrome.run("document.querySelector('th[data-key=bits_per_byte]').click()")
        assert chrome.run(names) == ["topk", "</script><b>x", "dense", "bad"]
        lines = "[...document.querySelectorAll('#plot polyline')].map(l => l.dataset.name)"
        assert chrome.run(lines) == ["topk", "</script><b>x", "dense"]
        strokes = "new Set([...document.querySelectorAll('#plot polyline')].map(l => getComputedStyle(l).stroke)).size"
        assert chrome.run(strokes) == 3
        chrome.run("document.querySelector('#what button[data-value=max_vio]').click()")
        assert chrome.run(lines) == ["topk", "</script><b>x"]
        chrome.run("document.querySelector('#groups button[data-value=twins]').click()")
        assert chrome.run(lines) == [] and chrome.run(names) == ["dense", "bad"]
        chrome.run("document.querySelector('#groups button[data-value=all]').click()")
        chrome.run("document.querySelector('tr[data-name=topk]').click()")
        assert chrome.run("[...document.querySelectorAll('polyline.on')].map(l => l.dataset.name)") == ["topk"]
        chrome.run("document.querySelector('tr[data-name=topk]').click()")
        assert chrome.run("document.querySelectorAll('.on').length") == 0
        assert chrome.problems == [] and chrome.requests == [file.as_uri()]


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_narrow_screens_do_not_scroll_sideways(tmp_path, dark):
    file = write_page(tmp_path / "p.html", "sweep", summary())
    with browser.Browser(width=390, height=800, dark=dark) as chrome:
        chrome.open(file)
        assert chrome.run("document.documentElement.scrollWidth") <= 390
        ink, paper = (chrome.run(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
        light = [sum(map(float, re.findall(r"[\d.]+", colour)[:3])) for colour in (ink, paper)]
        assert (light[0] > light[1]) == dark
