"""`experts_implementation="moesaic"`: registered by import, equal to eager, forward, backward and decoding."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import moesaic


def rerun_under(model, name, call):
    model.set_experts_implementation(name)
    return call()


def test_importing_the_view_registers_and_importing_moesaic_imports_no_torch():
    code = (
        "import sys, moesaic; assert 'torch' not in sys.modules; assert callable(moesaic.view); assert callable(moesaic.load);"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS; assert 'moesaic' in ALL_EXPERTS_FUNCTIONS;"
        "import moesaic.view; assert callable(moesaic.view)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_logits_equal_eager(model, ids, logits):
    eager = logits(model, ids)
    model.set_experts_implementation("moesaic")
    ours = logits(model, ids)
    assert (ours - eager).norm() / eager.norm() < 1e-5
    moesaic.view(model)[0].bank[1] = moesaic.view(model)[0].bank[0]
    changed = logits(model, ids)
    model.set_experts_implementation("eager")
    assert (changed - logits(model, ids)).norm() / eager.norm() < 1e-5


def test_gradients_equal_eager(model, ids):
    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    eager, ours = (rerun_under(model, name, gradients) for name in ("eager", "moesaic"))
    assert eager.keys() == ours.keys()
    for name in eager:
        torch.testing.assert_close(ours[name], eager[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_greedy_tokens_equal_eager(model, ids):
    """generate() with a cache: one token at a time through our kernels."""
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def generate():
        return model.generate(ids, **options)

    assert torch.equal(rerun_under(model, "eager", generate), rerun_under(model, "moesaic", generate))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(qwen, ids, logits, dtype):
    qwen.to(dtype)
    eager = logits(qwen, ids)
    qwen.set_experts_implementation("moesaic")
    ours = logits(qwen, ids)
    assert ours.dtype is dtype
    assert (ours - eager).float().norm() / eager.float().norm() < 0.05


def test_sentinels_of_expert_parallelism_are_skipped(qwen):
    """Ids past the last expert are another rank's slots: they add nothing."""
    qwen.set_experts_implementation("moesaic")
    experts = moesaic.view(qwen)[0].experts
    x = torch.randn(2, 32)
    with torch.no_grad():
        ours = experts(x, torch.tensor([[1, 8], [8, 8]]), torch.full((2, 2), 0.5))
        theirs = experts(x, torch.tensor([[1], [1]]), torch.full((2, 1), 0.5))
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1].abs().sum() == 0


def test_quantised_experts_are_refused_by_name(qwen):
    from moesaic.core.errors import BadInput

    qwen.set_experts_implementation("moesaic")
    block = moesaic.view(qwen)[0]
    block.experts.down_proj = torch.nn.Parameter(block.experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(BadInput, match=r"float8_e4m3fn with scales.*dequantised"):
        block.experts(torch.randn(1, 32), torch.tensor([[0]]), torch.ones(1, 1))
    with pytest.raises(BadInput, match="load the model dequantised"):
        block.bank[0]
