"""Tiny random models for steering, their inputs, and the bundled model."""

from __future__ import annotations

import pytest
import torch
import transformers

import moesaic
from moesaic.view import tiny


@pytest.fixture
def make():
    """make(class name, **configuration fields) -> a tiny model in eager float32."""

    def build(name: str, **changes):
        model_class = getattr(transformers, name)
        model = tiny.build(model_class)
        if changes:
            config = type(model.config).from_dict({**model.config.to_dict(), **changes})
            other = model_class(config).eval()
            other.load_state_dict(model.state_dict())
            model = other
        model.set_experts_implementation("eager")
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model

    return build


@pytest.fixture
def mixtral(make):
    return make("MixtralForCausalLM")


@pytest.fixture
def ids():
    return torch.randint(8, 80, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def routings():
    """routings(blocks, model, ids, **policy) -> the routing of every block."""

    def run(blocks, model, ids, **policy):
        seen = []
        with blocks.policy(**policy), blocks.on_route(lambda routing, block: seen.append(routing)), torch.no_grad():
            model(input_ids=ids)
        return seen

    return run


@pytest.fixture(scope="session")
def bundled():
    """The bundled model and its tokenizer, in float32."""
    return moesaic.load("bundled", dtype="float32")
