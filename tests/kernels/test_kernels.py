"""Every backend against the naive twin: outputs and all gradients, on awkward shapes, in every convention."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import FORMS, SHAPES, Case, names, relative_error
from torch import nn

from moesaic.core.errors import BadInput
from moesaic.core.registry import entries
from moesaic.core.routing import Dispatch
from moesaic.kernels import (
    Weights,
    allow_packing,
    choose,
    dispatch_slots,
    expert_mlp,
    expert_mlp_slots,
    expert_mlp_stored,
    explain,
    pack,
    packing_state,
)
from moesaic.kernels.packing import can_pack

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""Relative error of outputs and gradients; bf16 differs by where it rounds."""

TRAINING = [e.name for e in entries("kernels") if e.facts["training"] and e.facts["devices"] == "any"]
CPU = [e.name for e in entries("kernels") if e.facts["devices"] in ("any", "cpu")]


@pytest.fixture
def packing():
    """A budget for packed copies, taken back after the test."""
    allow_packing(1 << 30)
    yield
    allow_packing(0)


def compare(case, backend, grad=True):
    want, got = case.run("reference", grad), case.run(backend, grad)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert relative_error(got[name], tensor) <= TOLERANCE[case.dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=names)
@pytest.mark.parametrize("backend", sorted({*TRAINING} - {"reference"}))
def test_output_and_gradients_on_awkward_shapes(backend, shape, dtype):
    compare(Case(dtype=dtype, **shape), backend)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=names)
@pytest.mark.parametrize("backend", sorted({*TRAINING} - {"reference"}))
def test_output_and_gradients_of_every_convention(backend, form, dtype):
    compare(Case(dtype=dtype, **form), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SHAPES + FORMS, ids=names)
@pytest.mark.parametrize("packs", [False, True], ids=["plain", "packed"])
def test_cpu_inference(case, dtype, packs, request):
    if packs:
        if not can_pack(dtype):
            pytest.skip(f"oneDNN packs no {dtype} on this machine")
        request.getfixturevalue("packing")
    compare(Case(dtype=dtype, **case), "cpu", grad=False)
    if packs and case.get("routing") != "no pairs":
        assert packing_state()["banks"] == 0  # the case's weights are gone, and so are their packed copies


@pytest.mark.parametrize(
    "case", [{"E": 4, "K": 2, "D": 256, "I": 128, "T": 700}, {"E": 2, "K": 1, "D": 512, "I": 256, "T": 1}], ids=names
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_that_take_the_fast_products(case, dtype):
    """Large enough for oneDNN's plain fp32 product, grouped bf16 and several blocks; small cases never reach them."""
    compare(Case(dtype=dtype, **case), "torch")
    compare(Case(dtype=dtype, **case), "cpu", grad=False)


@pytest.mark.parametrize("form", [{}, *FORMS[:1], FORMS[3]], ids=names)
def test_gradcheck(form):
    case = Case(T=5, E=3, K=2, D=6, I=4, dtype=torch.float64, **form)
    torch.manual_seed(7)
    experts_TK, leaves = case.experts_TK(), case.leaves()

    def layer(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        dispatch = Dispatch.of_slots(experts_TK, named.pop("weights"), case.E)
        return expert_mlp(
            named.pop("x"), dispatch, named.pop("gate_up"), named.pop("down"), backend="torch", **named, **case.how
        )

    assert torch.autograd.gradcheck(layer, tuple(leaves.values()))


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_weights():
    torch.manual_seed(0)
    case = Case(T=63, E=4, K=2, D=32, I=16)
    want = case.run("reference")
    with torch.autocast("cpu", torch.bfloat16):
        got = case.run("torch")
    for name, tensor in want.items():
        assert got[name].dtype == torch.float32
        assert 0 < relative_error(got[name], tensor) < 2e-2, name  # zero would mean that autocast was ignored


def test_parameters_inside_a_hook_get_gradients():
    case = Case(dtype=torch.float64)
    scale = torch.rand(case.D, dtype=torch.float64, requires_grad=True)
    case.how = {"post": lambda y_SD: y_SD * scale}
    grads = []
    for backend in ("reference", "torch"):
        torch.manual_seed(7)
        experts_TK, leaves = case.experts_TK(), case.leaves()
        dispatch = Dispatch.of_slots(experts_TK, leaves["weights"], case.E)
        y = expert_mlp(leaves["x"], dispatch, leaves["gate_up"], leaves["down"], backend=backend, **case.how)
        grads.append(torch.autograd.grad(y.square().sum(), scale)[0])
    assert relative_error(grads[1], grads[0]) < 1e-12
    with torch.enable_grad():  # also when nothing else needs one
        frozen = [leaf.detach() for leaf in leaves.values()]
        dispatch = Dispatch.of_slots(experts_TK, frozen[1], case.E)
        assert expert_mlp(frozen[0], dispatch, frozen[2], frozen[3], **case.how).requires_grad


def test_only_what_needs_a_gradient_gets_one():
    case = Case()
    torch.manual_seed(7)
    experts_TK, leaves = case.experts_TK(), case.leaves()
    frozen = {name: leaf.detach() for name, leaf in leaves.items()}
    dispatch = Dispatch.of_slots(experts_TK, frozen["weights"], case.E)
    y = expert_mlp(leaves["x"], dispatch, frozen["gate_up"], frozen["down"])
    y.sum().backward()
    want = torch.autograd.grad(
        expert_mlp(leaves["x"], dispatch, frozen["gate_up"], frozen["down"], backend="reference").sum(), leaves["x"]
    )[0]
    assert relative_error(leaves["x"].grad, want) < 1e-5
    assert frozen["gate_up"].grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_weights_are_never_stale(dtype):
    if not can_pack(dtype):
        pytest.skip(f"oneDNN packs no {dtype} on this machine")
    case = Case(E=4, K=2, D=64, I=32, dtype=dtype)
    torch.manual_seed(7)
    experts_TK, leaves = case.experts_TK(), case.leaves()
    x, gate_up, down = leaves["x"], nn.Parameter(leaves["gate_up"].detach()), nn.Parameter(leaves["down"].detach())
    dispatch = Dispatch.of_slots(experts_TK, leaves["weights"].detach(), case.E)
    bank = pack(gate_up, down)

    @torch.no_grad()
    def follows():
        got = expert_mlp(x, dispatch, gate_up, down, packed=bank)
        want = expert_mlp(x, dispatch, gate_up, down, backend="reference")
        assert relative_error(got, want) < TOLERANCE[dtype]
        return got

    before = follows()
    with torch.no_grad():
        gate_up[1].mul_(-2)  # in place, through a view
    assert not torch.equal(before, follows())
    with torch.no_grad():
        down.copy_(torch.randn_like(down))
    follows()
    gate_up.data = torch.randn_like(gate_up) / 8  # other memory behind the same parameter
    follows()
    optimizer = torch.optim.SGD([gate_up, down], lr=1.0)
    gate_up.grad, down.grad = torch.randn_like(gate_up), torch.randn_like(down)
    optimizer.step()
    follows()
    gate_up.data.mul_(3)  # hidden from the version counter: the one case that must be announced
    bank.refresh()
    follows()


def test_packing_is_exact_counted_bounded_and_freed(packing):
    gate_up, down = nn.Parameter(torch.randn(4, 64, 32)), nn.Parameter(torch.randn(4, 32, 32))
    bank = pack(gate_up, down)
    for e in range(4):
        assert torch.equal(bank.expert(e)[0], gate_up[e])
        assert torch.equal(bank.expert(e)[1], down[e])
    assert bank.nbytes >= gate_up.nbytes + down.nbytes
    x, dispatch = torch.randn(1, 32), dispatch_slots(torch.tensor([[2]]), torch.ones(1, 1), 4)
    with torch.no_grad():
        expert_mlp(x, dispatch, gate_up, down)
        state = packing_state()
        assert state["banks"] == 1
        assert 0 < state["held_bytes"] < state["promised_bytes"]  # only the expert that was hit
        allow_packing(state["promised_bytes"])
        other = nn.Parameter(gate_up.detach().clone()), nn.Parameter(down.detach().clone())
        expert_mlp(x, dispatch, *other)
        assert packing_state()["banks"] == 1, "the second bank does not fit the budget"
        assert "spent" in choose(x, Weights(*other)).reason
    del gate_up
    assert packing_state() == {"granted_bytes": state["promised_bytes"], "promised_bytes": 0, "held_bytes": 0, "banks": 0}


def test_packed_bank_outlives_its_source():
    case = Case(E=4, K=2, D=64, I=32)
    torch.manual_seed(7)
    experts_TK, leaves = case.experts_TK(), case.leaves()
    dispatch = Dispatch.of_slots(experts_TK, leaves["weights"].detach(), case.E)
    want = expert_mlp(leaves["x"], dispatch, leaves["gate_up"], leaves["down"], backend="reference").detach()
    bank = pack(leaves.pop("gate_up"), leaves.pop("down"))
    assert relative_error(expert_mlp_stored(leaves["x"], dispatch, bank), want) < 2e-6


@pytest.mark.parametrize("backend", CPU)
def test_same_input_same_bits(backend):
    case = Case(T=1000, E=8, K=3, D=64, I=32, dtype=torch.bfloat16)
    grad = backend in TRAINING
    first, second = case.run(backend, grad), case.run(backend, grad)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("tokens", [1, 20, 200])
def test_slots_sort_like_dispatch(tokens):
    experts_TK, weights_TK = torch.randint(-1, 9, (tokens, 3)), torch.rand(tokens, 3)
    got, want = dispatch_slots(experts_TK, weights_TK, 8), Dispatch.of_slots(experts_TK, weights_TK, 8)
    for name in ("token_S", "weight_S", "offsets_E1", "tokens"):
        left, right = getattr(got, name), getattr(want, name)
        assert left == right if name == "tokens" else torch.equal(left, right), name


def test_slots_match_transformers_grouped_mm():
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    config = OlmoeConfig(hidden_size=64, intermediate_size=32, num_experts=8, num_experts_per_tok=2, num_hidden_layers=1)
    config._experts_implementation = "grouped_mm"
    experts = OlmoeSparseMoeBlock(config).experts
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, experts_TK, weights_TK = torch.randn(17, 64), torch.randint(0, 8, (17, 2)), torch.rand(17, 2)
    with torch.no_grad():
        want = experts(x, experts_TK, weights_TK)
        got = expert_mlp_slots(x, experts_TK, weights_TK, experts.gate_up_proj, experts.down_proj, act=experts.act_fn)
    assert relative_error(got, want) < 2e-6


def test_unhit_experts_are_never_read():
    gate_up, down = torch.randn(3, 16, 8), torch.randn(3, 8, 8)
    gate_up[1], down[1] = float("nan"), float("nan")
    dispatch = dispatch_slots(torch.tensor([[0, 2]]), torch.ones(1, 2), 3)
    for backend in CPU:
        with torch.no_grad():
            assert expert_mlp(torch.randn(1, 8), dispatch, gate_up, down, backend=backend).isfinite().all()


def test_choice_says_why():
    weights = Weights(torch.randn(2, 8, 4), torch.randn(2, 4, 4))
    assert choose(torch.randn(1, 4), weights).backend == "cpu"
    assert choose(torch.randn(1, 4, requires_grad=True), weights).backend == "torch"
    assert "gradients" in explain(weights, training=True)
    assert "packing budget" in explain(weights)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gate_up": torch.randn(3, 15, 8)}, "H = 2I"),
        ({"x_TD": torch.randn(5, 9)}, r"x is \[5, 9\]"),
        ({"x_TD": torch.randn(6, 8)}, "6 tokens"),
        ({"down": torch.randn(2, 8, 8)}, "experts"),
        ({"act": "swish2"}, "unknown activation"),
        ({"down_bias": torch.randn(3, 7)}, "down_bias"),
        ({"gate_up": torch.randn(3, 16)}, "3-D"),
    ],
    ids=lambda v: "" if isinstance(v, dict) else v,
)
def test_wrong_shapes_are_named(change, words):
    arguments = {"x_TD": torch.randn(5, 8), "gate_up": torch.randn(3, 16, 8), "down": torch.randn(3, 8, 8)} | change
    dispatch = dispatch_slots(torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1), 3)
    with pytest.raises(BadInput, match=words):
        expert_mlp(dispatch=dispatch, **arguments)


def test_cpu_backend_refuses_to_lose_gradients():
    weights = torch.randn(2, 8, 4, requires_grad=True), torch.randn(2, 4, 4)
    with pytest.raises(BadInput, match="no backward"):
        expert_mlp(torch.randn(1, 4), dispatch_slots(torch.tensor([[0]]), torch.ones(1, 1), 2), *weights, backend="cpu")
