"""Quick modules: the same model to rounding, found by what modules are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moesaic.kernels.few_rows import available
from moesaic.view import load
from moesaic.view.quick import QuickLinear, quicken

pytestmark = pytest.mark.skipif(not available(), reason="Numba is not installed")


def test_the_bundled_model_says_the_same():
    plain, quick = load("bundled").model, load("bundled").model
    made = quicken(quick)
    layers = quick.config.num_hidden_layers
    assert made == {
        "linear": 4 * layers + 1, "norm": 4 * layers + 1, "attention": 1, "router": layers, "step": layers, "stack": 0,
    }  # fmt: skip
    assert not any(value for name, value in quicken(quick).items() if name != "step")
    assert [*plain.state_dict()] == [*quick.state_dict()]
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        start = [model(ids[:, :8], use_cache=True) for model in (plain, quick)]
        caches = [out.past_key_values for out in start]
        for i in range(8, 40):
            out = [m(ids[:, i : i + 1], past_key_values=c).logits for m, c in zip((plain, quick), caches, strict=True)]
            error = (out[0] - out[1]).float().norm() / out[0].float().norm()
            assert error < 0.02  # bf16 over six layers; a wrong norm or head gives more than 0.5


def test_quick_layers_are_their_classes_and_still_learn():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(40, 8)).bfloat16()
    assert quicken(model)["linear"] == 1  # 40 columns are no whole lines
    assert isinstance(model[0], nn.Linear) and type(model[0]) is QuickLinear and type(model[1]) is nn.Linear
    model[0](torch.randn(1, 64).bfloat16()).sum().backward()
    assert model[0].weight.grad is not None


class Other(nn.Module):
    """Looks like a norm, and adds one to its weight."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(64).bfloat16()), 1e-6

    def forward(self, x):
        wide = x.float()
        return ((1 + self.weight.float()) * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def test_a_norm_of_another_kind_stays_as_it_is():
    assert quicken(nn.Sequential(Other()))["norm"] == 0


class Scaled(Other):
    """A root mean square norm that can be asked for more."""

    def forward(self, x, by=1.0):
        wide = x.float()
        return by * (self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype))


def test_a_norm_with_more_arguments_is_called_with_them():
    norm, x = Scaled(), torch.randn(1, 64).bfloat16()
    with torch.no_grad():
        want = norm(x, by=2.0)
        assert quicken(nn.Sequential(norm))["norm"] == 1
        assert torch.equal(norm(x, by=2.0), want) and torch.equal(norm(x, 2.0), want)


def test_wide_norms_are_quick_too():
    wide = Scaled()
    wide.weight = nn.Parameter(torch.randn(7168).bfloat16())
    assert quicken(nn.Sequential(wide))["norm"] == 1


def test_a_quick_model_can_still_be_traced():
    model = nn.Sequential(nn.Linear(64, 32, bias=False)).bfloat16()
    quicken(model)
    x = torch.randn(1, 64).bfloat16()
    with torch.no_grad():
        traced = torch.compile(model, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(traced.float(), model(x).float(), rtol=2.0**-6, atol=2.0**-6)
