"""The compiled attention of a decoding step against transformers' sdpa."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moesaic.kernels import attention
from moesaic.kernels.few_rows import available

needs_numba = pytest.mark.skipif(not available(), reason="Numba is not installed")


def given(sequences=1, heads=4, groups=2, queries=1, length=9, width=32, dtype=torch.bfloat16):
    module = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True, layer_idx=0)
    query = torch.randn(sequences, heads, queries, width).to(dtype)
    key, value = (torch.randn(sequences, groups, length, width).to(dtype) for _ in range(2))
    return module, query, key, value


@needs_numba
@pytest.mark.parametrize("shape", [
    {}, {"sequences": 3}, {"groups": 4}, {"groups": 1}, {"length": 1}, {"length": 257, "width": 96}, {"heads": 6, "groups": 3},
])  # fmt: skip
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_a_step_equals_sdpa(shape, scaling, monkeypatch):
    module, query, key, value = given(**shape)
    used = []
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *args: (used.append(1), attend(*args))[1])
    with torch.no_grad():
        got, none = attention.forward(module, query, key, value, None, scaling=scaling)
    want, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), None, scaling=scaling)
    assert used and none is None and got.shape == want.shape and got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=2.0**-6, atol=2.0**-7)


@pytest.mark.parametrize("case", ["queries", "mask", "dropout", "dtype", "width", "gradients"])
def test_what_is_no_plain_step_is_sdpas(case, monkeypatch):
    monkeypatch.setattr(attention, "attend", lambda *args: pytest.fail("the compiled pass was used"))
    shape = {"queries": {"queries": 3, "length": 3}, "dtype": {"dtype": torch.float32}, "width": {"width": 40}}.get(case, {})
    module, query, key, value = given(**shape)
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool) if case == "mask" else None
    with torch.set_grad_enabled(case == "gradients"):
        torch.manual_seed(1)
        got, _ = attention.forward(module, query, key, value, mask, dropout=0.5 if case == "dropout" else 0.0)
        torch.manual_seed(1)
        want, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=0.5 if case == "dropout" else 0.0)
    assert torch.equal(got, want)
