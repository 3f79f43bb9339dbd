"""The Triton path on a real GPU against the naive twin: outputs, gradients, memory, determinism."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import FORMS, SHAPES, Case, names, relative_error

from moesaic.core.routing import Dispatch
from moesaic.kernels import Weights, choose, expert_mlp

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LARGE = [{"T": 1000, "E": 64, "K": 8, "D": 256, "I": 128}, {"T": 4096, "E": 8, "K": 2, "D": 512, "I": 384}]


def on_gpu(case: dict) -> dict:
    return case | {"how": {**case.get("how", {}), "device": "cuda"}}


def compare(case: dict, dtype: torch.dtype, backend: str) -> None:
    want, got = (Case(dtype=dtype, **on_gpu(case)).run(name) for name in ("reference", backend))
    for name, tensor in want.items():
        assert relative_error(got[name], tensor) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [*SHAPES, *LARGE, {"how": {"transposed": True}}], ids=names)
def test_triton_matches_the_naive_twin(case, dtype):
    compare(case, dtype, "triton")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [*SHAPES, *FORMS], ids=names)
def test_torch_matches_the_naive_twin(case, dtype):
    compare(case, dtype, "torch")


def test_same_input_same_bits():
    runs = [Case(dtype=torch.bfloat16, **on_gpu(LARGE[0])).run("triton") for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_auto_takes_triton_for_swiglu_and_torch_for_the_rest():
    gate_up, down = torch.randn(2, 32, 16, device="cuda"), torch.randn(2, 16, 16, device="cuda")
    x = torch.randn(1, 16, device="cuda")
    assert choose(x, Weights(gate_up, down)).backend == "triton"
    assert choose(x.double(), Weights(gate_up.double(), down.double())).backend == "torch"


def test_training_keeps_less_than_the_gathered_rows():
    T, D, I, E, K = 8192, 1024, 256, 64, 8
    x = torch.randn(T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gate_up = torch.randn(E, 2 * I, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    down = torch.randn(E, D, I, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights_TK, experts_TK = torch.rand(T, E, device="cuda").topk(K)
    dispatch = Dispatch.of_slots(experts_TK, weights_TK, E)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = expert_mlp(x, dispatch, gate_up, down, backend="triton")
    held = torch.cuda.memory_allocated() - before
    assert y.requires_grad
    assert held < 1.5 * (T * K * 2 * I * 2 + T * D * 2)  # h and y; the gathered x alone would be T K D 2
