"""EvoMoE's diversification and moving numbers of experts, from YAML, through a resume and through kills."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from moesaic.core.errors import BadInput
from moesaic.training.config import TrainConfig
from moesaic.training.trainer import Trainer

spec = importlib.util.spec_from_file_location("runs", Path(__file__).with_name("test_trainer.py"))
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)

QUIET = Console(quiet=True)
MODEL = {
    "model_type": "moesaic", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "experts": 4, "k": 2,
    "expert_width": 8, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def reference(recipe):
    return {**recipe, "model": dict(MODEL), "experts_implementation": "moesaic", "balance": {"switch": 0.01}}


def test_one_expert_trains_alone_and_then_becomes_all(reference):
    rule = {"at": 6, "source": 1, "zeroed": 0.25}
    trainer = Trainer(TrainConfig(**{**reference, "spawn": rule}), QUIET)
    start = [bank.gate_up_EHD.detach().clone() for bank in trainer.phases.banks]
    seen, real = {}, trainer.step

    def step(number):
        trainer.phases.before(number)
        seen[number] = [bank.gate_up_EHD.detach().clone() for bank in trainer.phases.banks]
        return real(number)

    trainer.step = step
    trainer.run()
    decay = TrainConfig(**reference).weight_decay
    for first, early, late in zip(start, seen[5], seen[6], strict=True):
        assert not torch.allclose(early[1], first[1], rtol=0.02), "the source learned"
        for e in (0, 2, 3):  # the others got no gradient: what changed is weight decay alone
            ratio = early[e] / first[e]
            assert ratio.min() > 1 - 6 * 0.011 * decay and ratio.max() <= 1.0001
            both = (late[e] != 0) & (late[1] != 0)
            assert torch.equal(late[e][both], late[1][both]), "copies of one expert"
        for e in range(4):
            assert 0.15 < (late[e] == 0).float().mean() < 0.35, "a quarter of each copy is zero"
        assert not torch.equal(late[0], late[2]), "each its own quarter"
    log = [json.loads(line) for line in Path(reference["out"], "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(bank.row_to_expert is None for bank in trainer.phases.banks)


@pytest.mark.parametrize("cut", [4, 6, 8])
def test_a_resumed_run_stands_in_its_phase(reference, tmp_path, cut, monkeypatch):
    reference |= {"spawn": {"at": 6, "noise": 0.1}, "save_every": cut}
    whole = {**reference, "out": str(tmp_path / "whole")}
    Trainer(TrainConfig(**whole), QUIET).run()
    trainer = Trainer(TrainConfig(**reference), QUIET)
    real = trainer.step

    def die(step):
        if step == cut + 1:
            raise RuntimeError("died")
        return real(step)

    monkeypatch.setattr(trainer, "step", die)
    with pytest.raises(RuntimeError, match="died"):
        trainer.run()
    resumed = Trainer(TrainConfig(**reference), QUIET)
    resumed.run()
    assert resumed.resumed_from.name == f"step-{cut:06d}"
    runs.assert_same_run(reference["out"], whole["out"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spawn": {"at": 3, "source": 4}}, r"spawn\.source: no expert 4: a layer has 4"),
        ({"spawn": {"at": 3}, "model": {**MODEL, "experts": 0, "k": None}, "balance": {}}, "spawn: this model has no banks"),
        ({"spawn": {"at": 3}, "model": {**MODEL, "bank": "unequal"}}, "spawn: the experts of .* are not alike"),
    ],
)
def test_what_cannot_spawn_is_refused(reference, changes, words):
    with pytest.raises(BadInput, match=words):
        Trainer(TrainConfig(**{**reference, **changes}), QUIET)


def test_a_change_after_the_end_is_refused(reference):
    with pytest.raises(ValueError, match=r"spawn\.at: 12 must be less than steps, 12"):
        TrainConfig(**{**reference, "spawn": {"at": 12}})


def test_progressive_sparsification_from_a_recipe(reference):
    """Sigma-MoE-Tiny: layer 0 runs three experts, then one; layer 1 one throughout."""
    k = {"schedule": "progressive_sparsification", "first": [3, 1], "then": 1, "steps": 12, "switch": 0.5}
    reference["model"] |= {"k": None, "router_options": {"k": k, "convention": "softmax"}}
    trainer = Trainer(TrainConfig(**reference), QUIET)
    counts, real = [], trainer.balance.losses

    def losses(sequences, training):
        if training:
            counts.append([routing.counts_E().sum().item() / routing.tokens for routing in trainer.balance._routings])
        return real(sequences, training)

    trainer.balance.losses = losses
    trainer.run()
    assert counts[::2] == [[3.0, 1.0]] * 6 + [[1.0, 1.0]] * 6


@pytest.mark.slow
def test_kill_9_with_controllers_schedules_and_dropped_experts(reference, tmp_path):
    """What a resume must bring back beside the weights: biases, the step that schedules read, and random draws."""
    k = {"schedule": "linear", "start": 3, "end": 1, "steps": 40}
    reference["model"] |= {"k": None, "router_options": {"k": k, "convention": "sigmoid", "noise": "vmoe"}}
    reference |= {"balance": {"bias": 0.01}, "steps": 60, "save_every": 5, "eval_every": 20, "dtype": "bfloat16"}
    reference |= {"spawn": {"at": 20, "noise": 0.1}}
    whole = {**reference, "out": str(tmp_path / "whole")}
    Trainer(TrainConfig(**whole, threads=1), QUIET).run()
    for step in (12, 33):
        process = runs.run_command(reference, tmp_path, "--set", "threads=1")
        runs.wait_for_step(process, reference["out"], step)
        process.kill()
        process.communicate()
    out, error = runs.run_command(reference, tmp_path, "--set", "threads=1", "--json").communicate()
    assert json.loads(out)["resumed_from"], error
    runs.assert_same_run(reference["out"], whole["out"], steps=60)
    bias_E = load_file(Path(reference["out"], "final", "model.safetensors"))["model.layers.0.moe.router.bias_E"]
    assert bias_E.abs().max() > 0
