"""What every registered balancer earns by existing."""

from __future__ import annotations

import pytest
import torch

from moesaic.balancing.balancer import Scope
from moesaic.core import registry
from moesaic.core.routing import Routing
from moesaic.routing.select import top_k

BALANCERS = [entry.name for entry in registry.entries("balancing")]


def left_by_routers(logits):
    """What the routers that some losses are made for leave in `aux`."""
    return {
        "noise_scale": torch.tensor(1.0),
        "prototype_ED": logits[:8].tanh(),
        "token_mean_ED": logits[8:16].tanh(),
        "used_E": torch.arange(8) != 3,
        "outputs_END": torch.stack([logits[:20, :3], logits[:20, 3:6]]),
        "vision_T": torch.arange(len(logits)) % 3 == 0,
    }


def routing_of(logits, k=2):
    probs = logits.softmax(-1)
    ids = top_k(logits, k)
    return Routing(logits, probs, ids, probs.gather(1, ids), aux=left_by_routers(logits))


@pytest.mark.parametrize("name", BALANCERS)
def test_a_loss_is_a_scalar_with_gradient_to_the_router(name):
    logits = torch.randn(30, 8, requires_grad=True)
    balancer = registry.get("balancing", name).build()
    value = balancer.loss(routing_of(logits), Scope(sequence_ids=torch.arange(30) // 10))
    if value is None:
        assert hasattr(balancer, "after_step") and name == "bias"
        return
    assert value.shape == () and value.isfinite() and balancer.coefficient > 0
    (grad,) = torch.autograd.grad(value, logits, allow_unused=True)
    flat = name == "device"  # one device by default: the constant 1
    assert flat or grad.abs().sum() > 0


@pytest.mark.parametrize("name", BALANCERS)
def test_padding_is_in_no_statistic(name):
    logits = torch.randn(30, 8)
    mask = torch.arange(30) < 20
    sequence = torch.arange(30) // 10
    balancer = registry.get("balancing", name).build()
    noisy = torch.where(mask[:, None], logits, 10 * torch.randn(30, 8))
    values = [balancer.loss(routing_of(l), Scope(mask, sequence)) for l in (logits, noisy)]
    short = balancer.loss(routing_of(logits[:20]), Scope(None, sequence[:20]))
    if values[0] is None:
        return
    torch.testing.assert_close(values[0], values[1])
    if name != "sequence":  # its mean also runs over the sequence that is all padding
        torch.testing.assert_close(values[0], short)
