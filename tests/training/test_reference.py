"""`moesaic train` builds the reference model with any router, resumes it exactly, and its folder is an ordinary checkpoint."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic.core.documents import read_documents
from moesaic.core.errors import BadInput
from moesaic.evaluation.bits_per_byte import score_documents
from moesaic.training import build
from moesaic.training.config import TrainConfig
from moesaic.training.trainer import Interrupted, Trainer

QUIET = Console(quiet=True)
TIMES = {"tokens_per_second", "seconds"}
MODEL = {
    "model_type": "moesaic", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "experts": 4, "k": 2,
    "expert_width": 8, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def reference(recipe):
    return {**recipe, "model": dict(MODEL), "experts_implementation": "moesaic"}


def records(out):
    lines = Path(out, "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def bits_per_byte(final, data):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final).eval(), AutoTokenizer.from_pretrained(final)
    (score,) = score_documents(model, tokenizer, read_documents(data)).values()
    return score.bits_per_byte


@pytest.mark.parametrize(
    ("fields", "balance"),
    [
        ({"router": "adamoe", "layer": None}, {"adamoe": 0.01}),
        ({"router": "rmoe", "shared_experts": 1}, {"switch": 0.01, "z": 0.001}),
        ({"experts": 0, "k": None}, {}),
    ],
)
def test_trains_any_router_and_the_folder_reloads(reference, fields, balance):
    reference["model"] |= fields
    trainer = Trainer(TrainConfig(**{**reference, "balance": balance}), QUIET)
    final = trainer.run()
    log = records(reference["out"])
    assert log[-1]["loss"] < log[0]["loss"] - 0.3
    assert [("max_vio" in r, set(balance) <= r.keys()) for r in log] == [(bool(balance), True)] * 12
    assert int(trainer.model.model.step) == 12
    whole = bits_per_byte(final, reference["valid"])
    assert 0 < whole < 8
    assert whole < 0.95 * bits_per_byte_at_start(reference, trainer)


@pytest.mark.parametrize(("layer", "loss"), [("deepseekmoe", "switch"), ("maestro", "lasso")])
def test_layers_that_bring_their_own_losses_train(reference, layer, loss):
    reference["model"] |= {"layer": layer}
    Trainer(TrainConfig(**{**reference, "balance": {}}), QUIET).run()
    log = records(reference["out"])
    assert log[-1]["loss"] < log[0]["loss"] - 0.3
    assert all(record[loss] > 0 for record in log)


def bits_per_byte_at_start(reference, trainer):
    torch.manual_seed(1)
    fresh = AutoModelForCausalLM.from_config(trainer.model.config).eval()
    (score,) = score_documents(fresh, trainer.tokenizer, read_documents(reference["valid"])).values()
    return score.bits_per_byte


def test_controllers_and_steps_resume_bit_for_bit(reference, tmp_path, monkeypatch):
    """A bias controller and noisy scores: state in buffers, draws from the saved random state."""
    reference["model"] |= {"router_options": {"convention": "sigmoid", "noise": "vmoe"}}
    reference["balance"] = {"bias": 0.01, "sequence": 0.001}
    whole = {**reference, "out": str(tmp_path / "whole")}
    Trainer(TrainConfig(**whole), QUIET).run()
    trainer = Trainer(TrainConfig(**reference), QUIET)
    real = trainer.step

    def interrupted(step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return real(step)

    monkeypatch.setattr(trainer, "step", interrupted)
    with pytest.raises(Interrupted, match="step-000007"):
        trainer.run()
    Trainer(TrainConfig(**reference), QUIET).run()
    assert records(reference["out"]) == records(whole["out"])
    a, b = (load_file(Path(run["out"], "final", "model.safetensors")) for run in (reference, whole))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert int(a["model.step"]) == 12
    bias_E = a["model.layers.0.moe.router.bias_E"]
    assert bias_E.abs().max() >= 0.0099 and bias_E.abs().max() <= 0.121


@pytest.mark.parametrize("router", ["topk", "adamoe", "rmoe"])
def test_the_recipe_builds_with_another_router(router, tiny_tokenizer):
    path = Path(__file__).parents[2] / "recipes" / "reference.yaml"
    config = TrainConfig.read(path, [f"model.router={router}", "balance={z: 0.01}"])
    model = build.build_model(config, AutoTokenizer.from_pretrained(tiny_tokenizer))
    assert type(model).__name__ == "MoesaicForCausalLM"
    assert [type(b).__name__ for b in model.model.blocks[0].moe.balancers.values()] == ["Z"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {**MODEL, "router": "adamo"}}, "model: no routing method 'adamo'"),
        ({"model": {**MODEL, "roter": "adamoe"}}, "model.roter: moesaic has no such field; did you mean router"),
        ({"model": {**MODEL, "router": "expert_choice", "k": None}}, "model: ExpertChoice lets .*causal host"),
        ({"model": {**MODEL, "k": 9}}, "model: k=9 experts per token"),
        ({"model": {**MODEL, "balance": {"switch": 1.0}}}, "balance and model.balance: give one of them"),
        ({"balance": {"swich": 1.0}}, "model: no balancing method 'swich'"),
        ({"seq_len": 65}, "seq_len: 65 is more than .*64"),
    ],
)
def test_refusals_name_the_field(reference, changes, words):
    with pytest.raises(BadInput, match=words):
        Trainer(TrainConfig(**{**reference, **changes}), QUIET)


def test_random_experts_train_to_agree(reference):
    """THOR's objective: the second forward draws other experts, and the agreement is a loss with a coefficient."""
    reference["model"] |= {"router": "thor", "k": None, "experts": 3}
    trainer = Trainer(TrainConfig(**{**reference, "consistency": 2.0}), QUIET)
    trainer.run()
    log = records(reference["out"])
    assert sum(r["consistency"] > 0 for r in log) >= 6, "two draws differ in most steps"
    assert log[-1]["loss"] < log[0]["loss"] - 0.3
    trainer.model.eval()
    assert "consistency" not in trainer.loss(trainer.train_data.rows(0, 2))[1]
