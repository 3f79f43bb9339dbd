"""Card: layers-and-balancing.md, "Demons in the Detail": what must hold, on one process and on two."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.balancing.balancer import Scope
from moesaic.balancing.p_penalty import ParameterPenalty
from moesaic.balancing.scope import SCOPES, Counting
from moesaic.balancing.sequence import Sequence
from moesaic.balancing.switch import Switch
from moesaic.core import registry
from moesaic.core.errors import BadInput
from moesaic.core.routing import Routing
from moesaic.models.reference import ReferenceLM
from moesaic.routing.select import top_k


def routing_of(logits, k=2):
    probs = logits.softmax(-1)
    ids = top_k(logits, k)
    return Routing(logits, probs, ids, probs.gather(1, ids))


def whole_and_parts(parts=2, tokens=30, experts=6, skew=1.0):
    logits = [torch.randn(tokens, experts) + skew * i * torch.arange(experts) / experts for i in range(parts)]
    return routing_of(torch.cat(logits)), [routing_of(part) for part in logits]


def buffered(name, parts, loss):
    """The loss of each micro-step of one optimiser step."""
    counting = Counting(name)
    return [counting.loss(loss, part, counting.scope()) for part in parts]


def test_the_mean_over_ranks_with_global_counts_is_the_loss_of_the_whole_batch():
    """Exact, by linearity in P: here each part is handed the counts of all of them."""
    whole, parts = whole_and_parts()
    counts = whole.counts_E()
    losses = [Switch().loss(part, Scope(total=lambda name, own: counts)) for part in parts]
    torch.testing.assert_close(torch.stack(losses).mean(), Switch().loss(whole, Scope()))


@pytest.mark.parametrize("name", ["micro_batch", "data_parallel", "global"])
def test_one_process_without_accumulation_is_the_switch_loss(name):
    whole, _ = whole_and_parts()
    torch.testing.assert_close(buffered(name, [whole], Switch())[0], Switch().loss(whole, Scope()))


def test_equal_loads_make_all_scopes_agree():
    ids = torch.arange(12).view(6, 2) % 4
    probs = torch.randn(2, 6, 4).softmax(-1)
    parts = [Routing(p.log(), p, ids, p.gather(1, ids)) for p in probs]
    for a, b in zip(buffered("micro_batch", parts, Switch()), buffered("global", parts, Switch()), strict=True):
        torch.testing.assert_close(a, b)


def test_two_domains_on_their_own_experts_are_no_imbalance_of_the_global_batch():
    pure = []
    for expert in (0, 1):
        ids = torch.full((8, 1), expert)
        p = torch.nn.functional.one_hot(ids[:, 0], 2).float()
        pure.append(Routing(p.clamp(min=1e-9).log(), p, ids, torch.ones(8, 1)))
    assert [round(v.item(), 6) for v in buffered("micro_batch", pure, Switch())] == [2.0, 2.0]
    assert [round(v.item(), 6) for v in buffered("global", pure, Switch())] == [2.0, 1.0]  # the second step sees both


def test_the_buffer_adds_counts_and_is_emptied_by_the_optimiser_step():
    whole, parts = whole_and_parts()
    counting = Counting("global")
    scopes = []
    for part in parts:
        scopes.append(counting.scope())
        scopes[-1].tally("load", part.counts_E())
    torch.testing.assert_close(scopes[-1].tally("load", parts[1].counts_E()), whole.counts_E().double())
    counting.after_step()
    assert torch.equal(counting.scope().tally("load", parts[0].counts_E()), parts[0].counts_E().double())


def test_asking_twice_in_one_call_counts_once_and_visits_keep_apart():
    _, (a, b) = whole_and_parts()
    counting = Counting("global")
    first = counting.scope(visit=0)
    for _ in range(3):
        first.tally("load", a.counts_E())
    second = counting.scope(visit=1)
    assert torch.equal(second.tally("load", b.counts_E()), b.counts_E().double())
    assert torch.equal(first.tally("load", a.counts_E()), a.counts_E().double())


def test_unequal_token_counts_weigh_by_tokens_not_by_ranks():
    few, many = routing_of(torch.randn(4, 6)), routing_of(torch.randn(60, 6))
    counting = Counting("global")
    for part in (few, many):
        f_E = counting.scope().tally("load", part.counts_E())
    want = torch.cat([few.experts_TK, many.experts_TK]).flatten().bincount(minlength=6)
    assert torch.equal(f_E, want.double())


def test_counts_get_no_gradient():
    logits = torch.randn(20, 6, requires_grad=True)
    counting = Counting("global")
    scope = counting.scope()
    assert not scope.tally("load", routing_of(logits).counts_E() + 0 * logits.sum()).requires_grad


def test_sequence_scope_is_the_mean_of_each_sequence_alone():
    logits, ids = torch.randn(30, 6), torch.arange(30) // 10
    mask = torch.arange(30) < 20  # the third sequence is padding
    counting = Counting("sequence")
    found = counting.loss(Switch(), routing_of(logits), counting.scope(mask, ids))
    alone = [Switch().loss(routing_of(logits[s : s + 10]), Scope()) for s in (0, 10)]
    torch.testing.assert_close(found, torch.stack(alone).mean())
    torch.testing.assert_close(found, Sequence().loss(routing_of(logits[:20]), Scope(None, ids[:20])))
    with pytest.raises(BadInput, match="sequence_ids"):
        counting.loss(Switch(), routing_of(logits), counting.scope())
    with pytest.raises(BadInput, match="one of sequence, micro_batch"):
        Counting("everything")


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", [e.name for e in registry.entries("balancing")])
def test_every_balancer_works_in_every_scope(name, scope):
    logits = torch.randn(24, 8, requires_grad=True)
    aux = {
        "noise_scale": torch.tensor(1.0), "prototype_ED": logits[:8].tanh(), "token_mean_ED": logits[8:16].tanh(),
        "used_E": torch.arange(8) != 3, "vision_T": torch.arange(24) % 3 == 0,
    }  # fmt: skip
    balancer, counting = registry.get("balancing", name).build(), Counting(scope)
    aux |= {"outputs_END": torch.randn(8, 9, 5)} if getattr(balancer, "output_tokens", 0) else {}
    for _ in range(2):
        routing = routing_of(logits).replace(aux=aux)
        value = counting.loss(balancer, routing, counting.scope(None, torch.arange(24) // 8))
        assert value is None or value.isfinite()


def test_the_penalty_of_parameters_counts_slots_over_the_scope():
    """With K = 1 in one part and K = 2 in the other, the activated width is that of both."""
    logits = torch.randn(20, 4)
    parts = [routing_of(logits[:10], 1), routing_of(logits[10:], 2)]
    one = parts[0].replace(experts_TK=torch.nn.functional.pad(parts[0].experts_TK, (0, 1), value=-1))
    whole = Routing(logits, logits.softmax(-1), torch.cat([one.experts_TK, parts[1].experts_TK]), torch.ones(20, 2))
    counts, tokens = whole.counts_E(), torch.tensor(20.0)
    scope = Scope(total=lambda name, own: tokens if name == "tokens" else counts)
    losses = [ParameterPenalty(widths=[1, 2, 3, 4]).loss(part, scope) for part in parts]
    torch.testing.assert_close(torch.stack(losses).mean(), ParameterPenalty(widths=[1, 2, 3, 4]).loss(whole, Scope()))


def test_recomputation_sees_the_totals_of_the_first_forward():
    """Two micro-steps: equal gradients with and without recomputed blocks, and the buffer counts once."""
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        balance = {"switch": 0.5, "p_penalty": 0.1}
        model = ReferenceLM(dim=32, heads=2, experts=4, balance=balance, checkpoint=checkpoint, balance_scope="global").train()
        for step in range(2):
            loss, _ = model(torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(step)))
            loss.backward()
        sums = model.blocks[0].moe.counting._sums
        assert sums[0, "load"].sum() == 2 * 2 * 20 * 2
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.after_step()
        assert not sums
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


BALANCE = {"switch": 0.5, "z": 0.01, "bias": 0.01, "p_penalty": 0.1}


def small_model(scope):
    torch.manual_seed(0)
    return ReferenceLM(
        dim=32, heads=2, experts=4, balance=BALANCE, balance_scope=scope, router_options={"convention": "sigmoid"}
    ).train()


def batch():
    return torch.randint(0, 256, (4, 20), generator=torch.Generator().manual_seed(3))


def on_rank(rank, port, folder):
    """One of two processes: its half of the batch, gradients averaged as DistributedDataParallel does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = small_model("data_parallel")
    loss, _ = model(batch()[2 * rank : 2 * rank + 2])
    loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= 2
    mean = loss.detach().clone()
    torch.distributed.all_reduce(mean)
    model.after_step()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    save_file({**grads, "loss": mean / 2, "bias": model.blocks[0].moe.router.bias_E}, f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(port), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    model = small_model("micro_batch")
    loss, _ = model(batch())
    loss.backward()
    model.after_step()
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        torch.testing.assert_close(found["loss"], loss.detach())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(found["bias"], model.blocks[0].moe.router.bias_E) and found["bias"].any()


if __name__ == "__main__":
    on_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
