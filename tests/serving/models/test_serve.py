"""Several models behind one address: the official OpenAI client, real tiny models, a budget for fewer than there are."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import httpx
import openai
import pytest
import torch

from moesaic.core.errors import BadInput, MoesaicError
from moesaic.serving.http.server import Server, listen, serve
from moesaic.serving.models.app import build
from moesaic.serving.models.checkpoints import as_served, weight_bytes
from moesaic.serving.models.fleet import Fleet
from moesaic.view import load

ENGINE = {"max_rows": 8, "max_waiting": 64, "max_context": None, "alone": False}
SERVICE = {"timeout": 60.0, "write_timeout": 60.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    """Three stock Qwen3-MoE checkpoints with weights of their own."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tiny_tokenizer))
    found = {}
    for number, name in enumerate(("red", "green", "blue")):
        torch.manual_seed(number)
        config = AutoConfig.for_model(
            "qwen3_moe", vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=512, initializer_range=0.3,
            eos_token_id=0, bos_token_id=None, tie_word_embeddings=True, moe_intermediate_size=8, num_experts=4,
            num_experts_per_tok=2,
        )  # fmt: skip
        found[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def alone(folders):
    """Greedy answers of each model by itself: name -> prompt -> text."""

    def answer(name, prompt, tokens=6):
        model, tokenizer = load(folders[name], dtype="float32")
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = model.generate(ids, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return {name: {p: answer(name, p) for p in ("The router", "Schichten")} for name in folders}


class Running:
    def __init__(self, folders, room, pinned=(), max_wait=5.0, timeout=60.0, **fleet):
        how = {"dtype": "float32"}
        known = [as_served(n, f, load=how, engine=ENGINE, service=SERVICE, pinned=n in pinned) for n, f in folders.items()]
        self.fleet = Fleet(known, int(room * max(k.bytes for k in known)), max_wait=max_wait, timeout=timeout, **fleet)
        self.server = Server(build(self.fleet), self.fleet, grace=1.0)
        bound = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        self.thread = threading.Thread(target=serve, args=(self.server, bound), daemon=True)
        self.thread.start()
        until = time.monotonic() + 20
        while not self.server.started:
            assert time.monotonic() < until
            time.sleep(0.01)
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=60)

    def ask(self, name, prompt="The router", tokens=6):
        body = {"ignore_eos": True}
        found = self.client.completions.create(model=name, prompt=prompt, max_tokens=tokens, temperature=0, extra_body=body)
        return found.choices[0].text

    def stats(self):
        return httpx.get(self.url + "/stats").json()

    def stop(self):
        self.server.quit()
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def start(folders):
    made = []

    def make(room, **options):
        made.append(Running(folders, room, **options))
        return made[-1]

    yield make
    for server in made:
        server.stop()


def test_every_model_answers_as_it_does_alone(start, alone):
    server = start(2)
    for name in ("red", "green", "blue", "red", "blue"):
        for prompt, text in alone[name].items():
            assert server.ask(name, prompt) == text
        stats = server.stats()
        assert stats["resident_bytes"] <= stats["budget_bytes"]
        assert sum(m["resident"] for m in stats["models"]) <= 2
    assert (stats["loads"], stats["evictions"]) == (4, 2)  # red and green left; blue was still there
    assert stats["most_resident_bytes"] <= stats["budget_bytes"]
    names = [model.id for model in server.client.models.list()]
    assert names == ["red", "green", "blue"] and server.client.models.retrieve("red").id == "red"
    assert "moesaic_models_loads_total 4.0" in httpx.get(server.url + "/metrics").text


def test_many_at_once_in_room_for_one(start, alone):
    server = start(1, max_wait=0.2)
    asked = [(name, prompt) for _ in range(4) for name in alone for prompt in alone[name]]
    answers: dict[int, str] = {}

    def ask(i):
        answers[i] = server.ask(*asked[i])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [answers.get(i) for i in range(len(asked))] == [alone[name][prompt] for name, prompt in asked]
    stats = server.stats()
    assert 3 <= stats["loads"] < len(asked)  # grouped: far fewer switches than requests
    assert stats["most_resident_bytes"] <= stats["budget_bytes"]


def test_a_running_answer_ends_before_its_model_leaves(start):
    server = start(1, max_wait=0.1)
    stream = server.client.completions.create(
        model="red", prompt="The", max_tokens=150, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    pieces = [next(iter(stream)).choices[0]]
    other = threading.Thread(target=server.ask, args=("green",))
    other.start()
    pieces += [chunk.choices[0] for chunk in stream]
    other.join(60)
    assert pieces[-1].finish_reason == "length"
    assert [m["name"] for m in server.stats()["models"] if m["resident"]] == ["green"]


def test_the_pinned_model_stays(start):
    server = start(2, pinned=("red",))
    for name in ("red", "green", "blue", "green"):
        server.ask(name)
        held = {m["name"] for m in server.stats()["models"] if m["resident"]}
        assert held == {"red", name}


def test_a_model_that_left_is_gone(start):
    server = start(1)
    server.ask("red")
    left = weakref.ref(server.fleet._served["red"].engine.model)
    assert left() is not None
    server.ask("green")
    until = time.monotonic() + 10
    while left() is not None and time.monotonic() < until:
        gc.collect()
        time.sleep(0.05)
    assert left() is None


def test_chat_streams_through(start):
    server = start(1)
    chunks = server.client.chat.completions.create(
        model="blue",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    usage = [chunk.usage for chunk in chunks][-1]
    assert usage.completion_tokens >= 1
    assert len(server.client.embeddings.create(model="red", input="Hi").data[0].embedding) == 16


def test_errors_have_openais_shape(start):
    server = start(1)
    with pytest.raises(openai.NotFoundError, match="this server has red, green, blue"):
        server.ask("white")
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("white")
    for body, words in ((b"{", "not valid JSON"), (b"[]", "model: is missing"), (b'{"model": 3}', "model: is missing")):
        found = httpx.post(server.url + "/v1/completions", content=body)
        assert found.status_code == 400 and words in found.json()["error"]["message"]
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        server.ask("red", tokens=-1)
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}


def test_a_model_that_cannot_be_loaded_is_told_and_tried_again(start, alone):
    server = start(1)
    known = server.fleet.cache.models["green"]
    load_it, calls = known.load, []

    def fails_once():
        calls.append(1)
        if len(calls) == 1:
            raise MoesaicError("the file is torn")
        return load_it()

    object.__setattr__(known, "load", fails_once)
    with pytest.raises(openai.InternalServerError, match="the file is torn"):
        server.ask("green")
    assert server.ask("green") == alone["green"]["The router"]


def test_waiting_has_an_end(start):
    server = start(1, timeout=0.3, max_wait=0.05, max_waiting=1)
    server.fleet.cache.acquire("red")  # a request that never ends
    codes = []

    def ask():
        with pytest.raises(openai.APIStatusError) as found:
            server.ask("green")
        codes.append(found.value.status_code)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(codes) in ([408, 408, 429], [408, 429, 429])  # one waits, the others are refused, unless it gave up before
    assert server.fleet.waiting == 0
    server.fleet.cache.release("red")


def test_packed_experts_count_as_they_lie(folders, tmp_path, capsys):
    from moesaic.cli.main import main

    with pytest.raises(SystemExit) as end:
        main(["pack", str(folders["red"]), str(tmp_path / "packed"), "--json"])
    assert not end.value.code
    capsys.readouterr()
    model = load(tmp_path / "packed").model
    assert sum(p.nbytes for p in model.parameters()) <= weight_bytes(tmp_path / "packed")


def test_sizes_are_known_before_loading(folders, tiny_moe):
    for dtype, width in (("auto", 4), ("bfloat16", 2)):
        model = load(folders["red"], dtype=dtype).model
        assert sum(p.nbytes for p in model.parameters()) <= weight_bytes(folders["red"], dtype)
        assert next(model.parameters()).element_size() == width
    with pytest.raises(BadInput, match="download it first"):
        weight_bytes("someone/something")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--models", "RED"), "at least two"),
        (("--models", "RED,RED"), "two models of one name"),
        (("--models", "RED,BLUE"), "give --memory"),
        (("--models", "RED,BLUE", "--memory", "1GiB", "--resident", "0.4"), "--resident is about one model"),
        (("--models", "RED,BLUE", "--memory", "1GiB", "--pin", "x"), "--pin x"),
        (("--models", "RED,BLUE", "--memory", "1KiB"), "the budget is 1 KiB"),
        (("--models", "RED,BLUE", "--memory", "1GiB", "--policy", "belady"), "know the future"),
        (("--models", "RED,/nowhere", "--memory", "1GiB"), "no such model folder"),
        (("--pin", "x"), "give --models"),
    ],
)
def test_bad_options(folders, capsys, options, words):
    from moesaic.cli.main import main

    given = [o.replace("RED", f"red={folders['red']}").replace("BLUE", f"blue={folders['blue']}") for o in options]
    with pytest.raises(SystemExit) as end:
        main(["serve", "--port", "0", *given])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and words in err and not out


def test_the_command(folders, alone):
    models = ",".join(f"{name}={folder}" for name, folder in folders.items())
    arguments = ["serve", "--models", models, "--memory", "2MiB", "--dtype", "float32", "--port", "0", "--json"]
    code = f"from moesaic.cli.main import main; main({arguments!r})"
    server = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        facts = json.loads(server.stdout.readline())
        assert facts["models"][0]["name"] == "red" and facts["budget_bytes"] == 2 << 20
        asked = {"prompt": "The router", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        for name in ("red", "blue", "red"):
            found = httpx.post(f"{facts['url']}/v1/completions", json={"model": name, **asked}, timeout=60).json()
            assert found["choices"][0]["text"] == alone[name]["The router"]
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0


_spec = importlib.util.spec_from_file_location("live_page", Path(__file__).parents[1] / "http" / "test_page.py")
live_page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(live_page)


@live_page.pytestmark
def test_the_page_shows_who_is_in_memory(folders):
    running = Running(folders, room=2.2)
    try:
        with live_page.browser.Browser() as tab:
            tab.open(live_page.Address(running.url + "/"), live_page.READY)
            assert tab.run("document.querySelectorAll('#models tr').length") == 4
            assert "0 of 3" in tab.run("document.getElementById('count').innerText")
            for name in ("red", "green", "red", "blue"):
                running.client.completions.create(model=name, prompt="The router", max_tokens=2)
            live_page.until(tab, "document.getElementById('count').innerText.startsWith('2 of 3')")
            live_page.until(tab, "document.querySelectorAll('#bar i').length === 2")
            rows = tab.run("[...document.querySelectorAll('#models tr')].map(r => r.innerText).join('|')")
            assert "green" in rows and "on disk" in rows and "in memory" in rows
            assert "25.0 %" in tab.run("document.getElementById('facts').innerText"), "one of four requests found its model"
            if folder := os.environ.get("MOESAIC_SCREENSHOTS"):
                tab.screenshot(f"{folder}/serve-models.png")
            assert tab.problems == []
            assert all(url.startswith((running.url + "/", "data:")) for url in tab.requests), tab.requests
            assert tab.run("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
        policy = httpx.get(running.url + "/").headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
    finally:
        running.stop()
