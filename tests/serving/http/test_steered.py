"""Steering methods in a shared batch: an answer is that of its method alone, and its neighbours notice nothing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from moesaic.core.errors import BadInput
from moesaic.serving.http.engine import Engine
from moesaic.serving.http.jobs import Done, Failed
from moesaic.serving.http.sampling import Options
from moesaic.serving.http.steering import Steering
from moesaic.steering import Course, Steer, bound, steering, write
from moesaic.steering import Steering as Asked
from moesaic.steering.c3po import C3po
from moesaic.steering.references import collect
from moesaic.view import load, view

_spec = importlib.util.spec_from_file_location("engine_helpers", Path(__file__).with_name("test_engine.py"))
assert _spec and _spec.loader
helpers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(helpers)

WANTED = [
    {"steer": {"scmoe": {"beta": 2.0, "alpha": 0.001}}},
    None,
    {"steer": {"mote": {"off": {"0": [0, 1]}}}, "k": 3},
    {"steer": {"rewiring": {"steps": 2, "lr": 20.0, "every": 5, "layers": "all"}}},
    {"steer": {"scmoe": {"beta": 2.0, "alpha": 0.001}, "mote": {"off": {"1": [2]}}}},
    {"steer": {"naee_skip": {"beta": 1.0}}},
]


@pytest.fixture(scope="module")
def tiny(tiny_moe):
    model, tokenizer = load(str(tiny_moe), dtype="float32")
    return model, tokenizer


@pytest.mark.parametrize("alone", [False, True])
def test_every_answer_is_its_own(tiny, alone):
    model, tokenizer = tiny
    blocks = view(model)
    ids = tokenizer("the router")["input_ids"]
    engine = Engine(model, tokenizer, max_rows=12, alone=alone)
    engine.start()
    try:
        answers = helpers.Answers(engine)
        jobs = []
        for i, fields in enumerate(WANTED):
            steer = fields and Steering(fields, blocks, steering, model, tokenizer)
            options = Options(max_tokens=12, temperature=0, ignore_eos=True)
            jobs.append(answers.job(i, ids, options, steering=steer, n=2 if i == 0 else 1))
        engine.submit(jobs)
        answers.wait(len(WANTED))
    finally:
        engine.close()
        engine.join(10)
    assert all(isinstance(end, Done) for end in answers.ends.values()), answers.ends
    assert alone or engine.meter.stepped_rows > engine.meter.steps
    for i, fields in enumerate(WANTED):
        made = write(model, torch.tensor([ids]), bound(model, fields), max_new_tokens=12, do_sample=False, eos_token_id=None)
        text = tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert answers.texts[i, 0] == text, fields
    assert answers.texts[0, 1] == answers.texts[0, 0]
    assert len({answers.texts[i, 0] for i in range(len(WANTED))}) >= 5, "the methods have an effect"


def test_what_a_request_may_not_say(tiny):
    model, tokenizer = tiny
    blocks = view(model)
    with pytest.raises(BadInput, match="without steering methods"):
        Steering({"steer": {"scmoe": {}}}, blocks)
    for fields, message in (
        ({"steer": {"scmoe": {"beta": -1}}}, "beta"), ({"steer": {"mote": {"map": "/etc/passwd"}}}, "no file of this server"),
        ({"steer": {"scmoe": {"rank": 9}}}, "1 to 4"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            Steering(fields, blocks, lambda given: steering(given, files={}), model, tokenizer)


def test_a_method_that_fails_fails_its_own_answer(tiny):
    model, tokenizer = tiny
    ids = tokenizer("the router")["input_ids"]

    class Broken:
        def bind(self, *_):
            return self

        own = False
        rewrites = None

        def steps(self, prompt_ids):
            raise BadInput("no reference is near this prompt")
            yield

    engine = Engine(model, tokenizer)
    engine.start()
    try:
        answers = helpers.Answers(engine)
        broken = Steering({"steer": {"x": {}}}, engine.blocks, lambda fields: Broken())
        options = Options(max_tokens=4, temperature=0, ignore_eos=True)
        engine.submit([answers.job(0, ids, options, steering=broken), answers.job(1, ids, options)])
        answers.wait(2)
    finally:
        engine.close()
        engine.join(10)
    assert isinstance(answers.ends[0], Failed)
    assert "no reference" in str(answers.ends[0].error)
    assert isinstance(answers.ends[1], Done)


def test_others_go_on_while_a_method_works_out_its_course(tiny):
    """Gradient steps of one answer, in its beginning and in the middle, and steps of the others take turns."""
    model, tokenizer = tiny
    blocks = view(model)
    ids = tokenizer("the router")["input_ids"]
    prompts = [tokenizer(text)["input_ids"] for text in ("the router has", "the router is", "an expert")]
    with torch.no_grad():
        rows = [(p, [int(model(input_ids=torch.tensor([p])).logits[0, -1].argmax())], None) for p in prompts]
    store = collect(model, blocks, rows)
    asked = [
        {"steer": {"rewiring": {"steps": 40, "every": 3}}},
        lambda fields: Asked([C3po(store, "ngd", steps=20, leak=1.001)]),
        None,
        None,
    ]
    engine = Engine(model, tokenizer, max_rows=8)
    events = []
    for i, fields in enumerate(asked):
        steer = fields
        if callable(fields):
            steer = Steering({"steer": {"c3po": {}}}, blocks, fields, model, tokenizer)
        elif fields:
            steer = Steering(fields, blocks, steering, model, tokenizer)
        options = Options(max_tokens=6, temperature=0, ignore_eos=True)
        deliver = lambda event, i=i: events.append((i, event))  # noqa: E731
        asked[i] = helpers.Job(ids, options, deliver, 2 if i == 0 else 1, steer)
    engine.start()
    engine.submit(asked)
    engine.close(60)
    engine.join(60)
    ends = [i for i, event in events if isinstance(event, Done)]
    assert sorted(ends) == [0, 1, 2, 3], events
    first = {i: next(at for at, (j, _) in enumerate(events) if i == j) for i in range(4)}
    over = {i: next(at for at, (j, event) in enumerate(events) if i == j and isinstance(event, Done)) for i in range(4)}
    assert max(over[2], over[3]) < min(first[0], first[1]), "answers of six tokens are complete before forty gradient steps"
    again = Asked([C3po(store, "ngd", steps=20, leak=1.001)]).bind(model, blocks)
    made = write(model, torch.tensor([ids]), again, max_new_tokens=6, do_sample=False, eos_token_id=None)
    text = "".join(event.text for i, event in events if i == 1 and not isinstance(event, Done))
    assert text == tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Judge(Steer):
    """Refuses prompts of few tokens, and says how long they are."""

    def start(self, prompt_ids):
        few = len(prompt_ids) < 3
        return Course(notes={"length": len(prompt_ids)}, refused="too short" if few else None)


@pytest.mark.parametrize("chat", [False, True])
def test_answers_say_how_they_were_steered(tiny, start, chat):
    """The note stands in every choice, streamed or not; an answer withheld takes no other down."""
    server = start(*tiny, service={"methods": lambda fields: Asked([Judge()])})
    long, short = "the router scores every expert", "x"
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body = {"model": "tiny", "max_tokens": 4, "routing": {"steer": {"judge": {}}}, "ignore_eos": True}
    body |= {"messages": [{"role": "user", "content": long}]} if chat else {"prompt": [long, short], "n": 2}
    whole = server.post(path, body).json()["choices"]
    chunks = [line[6:] for line in server.post(path, {**body, "stream": True}).text.split("\n\n") if line.startswith("data: {")]
    streamed = [choice for chunk in chunks for choice in json.loads(chunk)["choices"] if "steering" in choice]
    for found in (whole, sorted(streamed, key=lambda choice: choice["index"])):
        assert [choice["index"] for choice in found] == list(range(len(whole)))
        for choice in found:
            assert choice["steering"]["exact"] is False and choice["steering"]["length"] >= 1
            assert choice["finish_reason"] == ("length" if choice["index"] < 2 else "content_filter")
            assert choice["steering"].get("abstained") == (None if choice["index"] < 2 else "too short")
    if not chat:
        assert [bool(choice["text"]) for choice in whole] == [True, True, False, False]
    plain = server.post(path, {**body, "routing": None}).json()["choices"][0]
    assert "steering" not in plain
