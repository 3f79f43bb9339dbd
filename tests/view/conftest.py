"""Tiny random models of different conventions, and the inputs to run them on."""

from __future__ import annotations

import pytest
import torch
import transformers

from moesaic.view import tiny

CONVENTIONS = {
    "Qwen3MoeForCausalLM": "softmax then top-k, renormalised",
    "MixtralForCausalLM": "top-k, renormalised in float32",
    "OlmoeForCausalLM": "not renormalised",
    "GptOssForCausalLM": "biased, transposed, interleaved, own gate",
    "DeepseekV3ForCausalLM": "group limited, shared expert, correction bias",
    "NemotronHForCausalLM": "no gate",
    "Gemma4ForCausalLM": "the router sits in the decoder layer and returns probabilities",
    "PhimoeForCausalLM": "sparse mixer: no top-k to be seen",
}


@pytest.fixture(params=CONVENTIONS)
def model(request):
    return build(request.param)


@pytest.fixture
def qwen():
    return build("Qwen3MoeForCausalLM")


def build(name: str, **changes):
    """A tiny model in eager float32; `changes` are fields of its configuration."""
    model_class = getattr(transformers, name)
    model = tiny.build(model_class)
    if changes:
        config = type(model.config).from_dict({**model.config.to_dict(), **changes})
        other = model_class(config).eval()
        other.load_state_dict(model.state_dict())
        model = other
    model.set_experts_implementation("eager")
    return model


@pytest.fixture
def ids():
    return torch.randint(8, 80, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make():
    """make(class name, **configuration fields) -> a tiny model."""
    return build


@pytest.fixture
def logits():
    """logits(model, ids, **more) -> the model's logits, without gradients."""

    def run(model, ids, **more):
        with torch.no_grad():
            return model(input_ids=ids, **more).logits

    return run
