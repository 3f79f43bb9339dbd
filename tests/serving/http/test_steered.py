"""Steering methods in a shared batch: an answer is that of its method alone, and its neighbours notice nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from moesaic.core.errors import BadInput
from moesaic.serving.http.engine import Engine
from moesaic.serving.http.jobs import Done, Failed
from moesaic.serving.http.sampling import Options
from moesaic.serving.http.steering import Steering
from moesaic.steering import bound, steering, write
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

        def start(self, prompt_ids):
            raise BadInput("no reference is near this prompt")

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
