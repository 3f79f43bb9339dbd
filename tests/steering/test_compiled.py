"""Compiled one-token passes give way to steering: what a policy or an adapter asks for holds in every step of decoding."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from moesaic.kernels.few_rows import available
from moesaic.steering import bound, write
from moesaic.steering.mogu import Mogu
from moesaic.steering.mogu_adapter import MoguAdapter
from moesaic.view import load
from moesaic.view.quick import quicken

pytestmark = pytest.mark.skipif(not available(), reason="Numba is not installed")
SPECS = {
    "mote": {"steer": {"mote": {"off": {layer: [0, 1, 2, 3] for layer in range(4)}}}},
    "logits": {"logits": [3.0, 2.0, 1.0] + [0.0] * 13},
    "k": {"k": 1},
    "rank": {"rank": 3},
    "threshold": {"threshold": 0.4},
    "naee_skip": "naee_skip:beta=0.9",
    "scmoe": "scmoe:beta=2,alpha=0.001",
    "rewiring": "rewiring:steps=2,lr=20,every=4,layers=all",
    "mogu": None,
}


@pytest.fixture(scope="module")
def two():
    """The bundled model in bf16: with its compiled passes, and as transformers runs it."""
    torch.set_num_threads(1)
    quick = load("bundled").model
    plain = copy.deepcopy(quick)
    found = quicken(quick)
    assert found["router"]
    return quick, plain


def adapter_of(model):
    torch.manual_seed(0)
    made = MoguAdapter(model, dropout=0.0).eval()
    random = torch.Generator().manual_seed(1)
    for layer in made.layers:
        for part in (layer.safe, layer.usable):
            part.up.data = torch.randn(part.up.shape, generator=random) * 0.3
        for gate in (layer.gate_safe, layer.gate_usable):
            for p in gate.parameters():
                p.data.zero_()
    return made


def stepped(model, course, blocks, ids):
    """Logits of one-token steps after a prompt, under what the course asks for."""
    around = course.around() if course.around is not None else torch.no_grad()
    cache, found = DynamicCache(config=model.config), []
    with torch.inference_mode(), around, blocks.policy(rows=[course.policy]) if course.policy else torch.no_grad():
        model(input_ids=ids[:, :8], past_key_values=cache, use_cache=True)
        for at in range(8, ids.shape[1]):
            found.append(model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits[0, -1].float())
    return torch.stack(found)


def apart(a, b):
    """In the median over steps: where two experts score alike, another order of summing may choose the other."""
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).median())


@pytest.mark.parametrize("name", [name for name in SPECS if name not in ("scmoe", "rewiring")])
def test_steps_follow_the_method(two, name):
    ids = (torch.arange(24) * 37 % 900 + 20)[None]
    found = []
    for model in two:
        steer = bound(model, Mogu(adapter_of(model)) if name == "mogu" else SPECS[name])
        found.append(stepped(model, steer.start(ids[0, :8].tolist()), steer.blocks, ids))
    unsteered = stepped(two[0], bound(two[0], None).start([]), steer.blocks, ids)
    assert apart(*found) < 0.04
    assert apart(found[0], unsteered) > 2 * apart(*found), "the method has an effect"


@pytest.mark.parametrize("name", ["scmoe", "rewiring", "logits", "mogu"])
def test_the_tokens_are_those_without_compiled_passes(two, name):
    ids = (torch.arange(12) * 53 % 900 + 20)[None]
    made = []
    for model in two:
        steer = bound(model, Mogu(adapter_of(model)) if name == "mogu" else SPECS[name])
        made.append(write(model, ids, steer, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0))
    assert torch.equal(*made)
