"""MoGU: the variants and the base as limits of the mixture, what learns when, the prefix, gates that tell prompts apart."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict

import pytest
import torch

from moesaic.core.errors import BadInput
from moesaic.steering import bound, write
from moesaic.steering.mogu import Mogu
from moesaic.steering.mogu_adapter import MoguAdapter, measure, projections, train_gates, train_lora


@pytest.fixture
def adapter(mixtral):
    """Random LoRAs, both with an effect."""
    made = MoguAdapter(mixtral, dropout=0.0).eval()
    random = torch.Generator().manual_seed(1)
    for layer in made.layers:
        for lora in (layer.safe, layer.usable):
            lora.up.data = torch.randn(lora.up.shape, generator=random) * 0.1
    return made


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_each_variant_is_its_merged_lora(mixtral, adapter, ids):
    plain = logits(mixtral, ids)
    for fixed, kind in (((1.0, 0.0), "safe"), ((0.0, 1.0), "usable")):
        with adapter.attached(mixtral), adapter.gated(*fixed):
            mixed = logits(mixtral, ids)
        kept = [(p, p.weight.data.clone()) for _, p in projections(mixtral)]
        for (p, _), layer in zip(kept, adapter.layers, strict=True):
            lora = getattr(layer, kind)
            p.weight.data += 2 * lora.up.data @ lora.down.data
        torch.testing.assert_close(mixed, logits(mixtral, ids), rtol=1e-4, atol=1e-5)
        for p, weight in kept:
            p.weight.data = weight
        assert not torch.allclose(mixed, plain)
    assert torch.equal(logits(mixtral, ids), plain), "nothing stays behind"


def test_base_and_scale(mixtral, ids):
    """Zero LoRAs: a + b = 1 is the model bit for bit; another sum scales o_proj, bias and all."""
    adapter = MoguAdapter(mixtral).eval()
    plain = logits(mixtral, ids)
    with adapter.attached(mixtral), adapter.gated(0.25, 0.75):
        assert torch.equal(logits(mixtral, ids), plain)
    with adapter.attached(mixtral), adapter.gated(1.0, 1.0):
        doubled = logits(mixtral, ids)
    for _, p in projections(mixtral):
        p.weight.data *= 2
    torch.testing.assert_close(doubled, logits(mixtral, ids), rtol=1e-5, atol=1e-6)


def test_what_learns_in_each_stage(mixtral, adapter, ids):
    rows = [(ids[0].tolist(), [9, 10], [30, 31]), (ids[1].tolist(), [11, 12], [32, 33])]
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    weights = {name: value.clone() for name, value in mixtral.state_dict().items()}
    train_gates(mixtral, adapter, rows[:1], rows[1:], epochs=2, lr=1e-2)
    moved = {name for name, value in adapter.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all("gate" in name for name in moved)
    train_lora(mixtral, adapter, "safe", rows, epochs=1, lr=1e-2)
    now = {name for name, value in adapter.state_dict().items() if not torch.equal(value, before[name])}
    assert now - moved and all(".safe." in name for name in now - moved)
    assert all(torch.equal(value, weights[name]) for name, value in mixtral.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in mixtral.parameters()), "the model is as it was, gradients too"


def test_after_the_prefix_the_model_writes_on_by_itself(mixtral, adapter, ids):
    made = write(mixtral, ids[:1], bound(mixtral, Mogu(adapter, tokens=5)), max_new_tokens=12, do_sample=False)
    with adapter.attached(mixtral):
        first = mixtral.generate(ids[:1], max_new_tokens=5, do_sample=False)
    assert torch.equal(made[:, :12], first)
    assert torch.equal(made, mixtral.generate(first, max_new_tokens=7, do_sample=False))
    with pytest.raises(BadInput, match="holds for a whole call"):
        write(mixtral, ids, bound(mixtral, Mogu(adapter)), max_new_tokens=2)


def test_an_adapter_goes_through_its_file(mixtral, make, adapter, ids, tmp_path):
    path = adapter.write(tmp_path / "a.safetensors")
    again = MoguAdapter.read(path)
    with adapter.attached(mixtral):
        one = logits(mixtral, ids)
    with again.attached(mixtral):
        assert torch.equal(logits(mixtral, ids), one)
    with pytest.raises(BadInput, match="another model"):
        MoguAdapter.read(path).check(torch.nn.Sequential(OrderedDict(o_proj=torch.nn.Linear(4, 4))))
    with pytest.raises(BadInput, match="no MoGU adapter"):
        MoguAdapter.read(tmp_path / "none")
    assert Mogu(str(path)).adapter is Mogu(str(path)).adapter, "a file is read once"
    adapter.write(path)
    os.utime(path, ns=(1, 1))
    assert Mogu(str(path)).adapter is not again


@pytest.mark.slow
def test_gates_tell_prompts_apart(bundled):
    """Toy behaviours on the bundled model: code stands for risky prompts, prose for harmless ones. After stage 2, a is larger
    on unseen code: AUC above 0.95."""
    model, tokenizer = copy.deepcopy(bundled.model), bundled.tokenizer
    code = [
        f"def {name}(x: int) -> int:\n    return x + {i}\n"
        for i, name in enumerate(("area", "push", "next", "load", "pop", "sum"))
    ]
    prose = [
        f"She {verb} that the old house was not what it had been." for verb in ("knew", "saw", "felt", "said", "told", "wrote")
    ]

    def ids(text):
        return tokenizer(text)["input_ids"]

    risky, harmless = ([(ids(text), ids("Yes"), ids("No")) for text in texts[:4]] for texts in (code, prose))
    adapter = MoguAdapter(model, dropout=0.0)
    losses = train_gates(model, adapter, harmless, risky, epochs=12, accumulate=4, lr=1e-3)
    assert losses[-1] < losses[0]
    found = measure(model, adapter, *([(ids(text), ids("Yes"), ids("No")) for text in texts[4:]] for texts in (prose, code)))
    assert found["auc"] > 0.95
    assert found["a_risky"] > found["a_harmless"]
