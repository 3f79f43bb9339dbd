"""The live page in a real browser: it shows what happens, asks nobody else, and logs no error."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from pathlib import Path

import httpx
import pytest

_spec = importlib.util.spec_from_file_location("browser", Path(__file__).parents[2] / "report" / "browser.py")
browser = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(browser)
pytestmark = pytest.mark.skipif(browser.find() is None, reason="no Chromium here")
READY = "document.documentElement?.dataset.ready === 'yes'"
BUSY = {"model": "tiny", "prompt": "Once upon a time", "ignore_eos": True, "temperature": 1}


class Address:
    """`Browser.open` takes a path; a server has an address."""

    def __init__(self, url):
        self.url = url

    def resolve(self):
        return self

    def as_uri(self):
        return self.url


def until(tab, script, seconds=10):
    deadline = time.monotonic() + seconds
    while not (found := tab.run(script)):
        assert time.monotonic() < deadline, (script, tab.problems)
        time.sleep(0.05)
    return found


def test_the_page_shows_what_happens(bundled, start):
    server = start(
        *bundled, names=("tiny",), service={"facts": {"architecture": "<b>Model</b>", "layers": 6, "experts": 16, "top_k": 2}}
    )
    with browser.Browser() as tab:
        tab.open(Address(server.url + "/"), READY)
        assert tab.run("document.getElementById('title').innerText").startswith("tiny")
        assert "<b>Model</b>" in tab.run("document.getElementById('title').innerText"), "names are text, never markup"
        assert tab.run("document.querySelectorAll('#heat td.c').length") == 6 * 16
        assert "0 of 16" in tab.run("document.getElementById('rows-note').innerText")
        work = [threading.Thread(target=server.post, args=("/v1/completions", {**BUSY, "n": 2, "max_tokens": 250, **more}))
                for more in ({}, {}, {"routing": {"k": 1}})]  # fmt: skip
        for thread in work:
            thread.start()
        until(tab, "document.querySelectorAll('#rows i.on').length === 6")
        until(tab, "parseFloat(document.getElementById('rate').innerText.replace(',', '')) > 5")
        until(tab, "[...document.querySelectorAll('#heat td.s')].every(s => parseFloat(s.innerText.slice(9)) >= 1)")
        assert "steered" in tab.run("document.getElementById('jobs').innerText")
        assert tab.run("document.getElementById('state').innerText") == "live"
        if folder := os.environ.get("MOESAIC_SCREENSHOTS"):
            tab.screenshot(f"{folder}/serve.png")
        tab.run("document.getElementById('by-total').click()")
        assert tab.run("document.getElementById('by-total').getAttribute('aria-pressed')") == "true"
        for thread in work:
            thread.join()
        until(tab, "document.getElementById('totals').innerText.includes('1,500 tokens written')")
        until(tab, "document.querySelectorAll('#rows i.on').length === 0")
        assert tab.problems == []
        assert tab.requests
        assert all(url.startswith((server.url + "/", "data:")) for url in tab.requests), tab.requests
        assert tab.run("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"


def test_the_page_asks_for_the_key_and_says_when_the_server_is_gone(tiny, start):
    server = start(*tiny, app={"keys": ["sesame"]})
    with browser.Browser(width=420, height=800, dark=True) as tab:
        tab.open(Address(server.url + "/"), READY)
        until(tab, "!document.getElementById('key-card').hidden")
        tab.run("document.getElementById('key').value = 'sesame'; document.querySelector('#key-form button').click()")
        until(tab, "document.getElementById('state').innerText === 'live'")
        assert tab.run("document.getElementById('key-card').hidden")
        assert tab.run("document.documentElement.scrollWidth <= innerWidth")
        if folder := os.environ.get("MOESAIC_SCREENSHOTS"):
            tab.screenshot(f"{folder}/serve-narrow.png")
        assert [p for p in tab.problems if "401" not in p] == []  # the browser itself logs the refused request
        server.stop()
        until(tab, "document.getElementById('state').innerText.startsWith('no answer')")


def test_the_policy_names_what_is_in_the_page(server):
    answer = httpx.get(server.url + "/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in answer.text.split("<script>")[0], "no address in its markup"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_shows_the_expert_cache(start):
    from moesaic.serving.streamed import load_streamed
    from moesaic.serving.streamed.describe import live_facts

    with load_streamed("bundled", dtype="float32", resident=0.4) as streamed:
        server = start(
            streamed.model, streamed.tokenizer, names=("tiny",), service={"streaming": lambda: live_facts(streamed.engine)}
        )
        with browser.Browser() as tab:
            tab.open(Address(server.url + "/"), READY)
            assert not tab.run("document.getElementById('cache-card').hidden")
            assert tab.run("document.querySelectorAll('#held td.c').length") == 6 * 16
            server.post("/v1/completions", {**BUSY, "max_tokens": 20})
            until(tab, "document.querySelectorAll('#held td.on').length > 20")
            assert tab.run("document.querySelectorAll('#held td.on').length") <= 0.4 * 6 * 16
            until(tab, "parseFloat(document.getElementById('hits').innerText) > 1")
            shown = tab.run("document.getElementById('cache').innerText")
            assert "lru" in shown and "exact" in shown and "MB" in shown
            if folder := os.environ.get("MOESAIC_SCREENSHOTS"):
                tab.screenshot(f"{folder}/serve-cache.png")
            assert tab.problems == []
        server.stop()
