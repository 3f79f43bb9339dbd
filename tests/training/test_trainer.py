"""Resuming is exact, broken checkpoints are passed over, divergence and bad fields stop with a reason."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic.core.errors import BadInput
from moesaic.training.config import TrainConfig
from moesaic.training.trainer import Interrupted, Trainer

QUIET = Console(quiet=True)
TIMES = {"tokens_per_second", "seconds"}


def records(out) -> list[dict]:
    lines = Path(out, "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def weights(out):
    return load_file(Path(out) / "final" / "model.safetensors")


def assert_same_run(one, other, steps=12):
    assert [r["step"] for r in records(one)] == list(range(steps))
    assert records(one) == records(other)
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def whole(recipe, tmp_path):
    """The run in one go that every other must equal."""
    recipe = {**recipe, "out": str(tmp_path / "whole")}
    Trainer(TrainConfig(**recipe), QUIET).run()
    return recipe["out"]


def test_learns_and_stock_transformers_loads_the_result(whole):
    losses = [r["loss"] for r in records(whole)]
    assert losses[-1] < losses[0] - 0.3
    assert [r["step"] for r in records(whole) if "valid_loss" in r] == [5, 11]
    model = AutoModelForCausalLM.from_pretrained(Path(whole) / "final")
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert AutoTokenizer.from_pretrained(Path(whole) / "final").eos_token_id == 0


def test_stop_and_resume_is_bit_identical(recipe, whole, monkeypatch):
    trainer = Trainer(TrainConfig(**recipe), QUIET)
    real = trainer.step

    def interrupted(step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return real(step)

    monkeypatch.setattr(trainer, "step", interrupted)
    with pytest.raises(Interrupted, match="step-000007"):
        trainer.run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = Trainer(TrainConfig(**recipe), QUIET)
    resumed.run()
    assert resumed.resumed_from.name == "step-000007"
    assert_same_run(recipe["out"], whole)


def run_command(recipe, tmp_path, *arguments, **kwargs):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-c", "from moesaic.cli.main import main; main()", "train", str(path), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **kwargs)


def wait_for_step(process, out, step):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        log = Path(out, "log.jsonl")
        if log.exists() and len(log.read_text().splitlines()) > step:
            return
        time.sleep(0.002)
    raise AssertionError(f"never got to step {step}: {process.communicate()}")


@pytest.mark.slow
def test_kill_9_and_resume_is_bit_identical(recipe, tmp_path):
    """Several kills at odd moments, each of a real process; bfloat16, with accumulation."""
    recipe = {**recipe, "steps": 60, "dtype": "bfloat16", "save_every": 5, "eval_every": 20}
    whole = {**recipe, "out": str(tmp_path / "whole")}
    Trainer(TrainConfig(**whole, threads=1), QUIET).run()
    for step in (7, 23, 41):
        process = run_command(recipe, tmp_path, "--set", "threads=1")
        wait_for_step(process, recipe["out"], step)
        process.kill()
        process.communicate()
    out, error = run_command(recipe, tmp_path, "--set", "threads=1", "--json").communicate()
    result = json.loads(out)
    assert result["resumed_from"], error
    assert_same_run(recipe["out"], whole["out"], steps=60)


@pytest.mark.slow
def test_sigint_saves_and_says_how_to_resume(recipe, tmp_path):
    process = run_command({**recipe, "steps": 100_000, "save_every": 100_000}, tmp_path)
    wait_for_step(process, recipe["out"], 3)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "saved" in error
    assert "run the same command to resume" in error
    assert "Traceback" not in error
    (saved,) = Path(recipe["out"], "checkpoints").glob("step-*")
    assert (saved / "optimizer.safetensors").exists()


def test_broken_and_half_written_checkpoints_are_passed_over(recipe, whole):
    Trainer(TrainConfig(**{**recipe, "steps": 8}), QUIET).run()
    folder = Path(recipe["out"], "checkpoints")
    assert sorted(p.name for p in folder.iterdir()) == ["step-000004", "step-000008"]
    shutil.rmtree(recipe["out"] + "/final")
    Path(recipe["out"], "log.jsonl").write_text(Path(recipe["out"], "log.jsonl").read_text() + '{"step": 8, "lo')
    (folder / ".step-000012.partial").mkdir()
    (folder / ".step-000012.partial" / "model.safetensors").write_bytes(b"half")
    optimizer = folder / "step-000008" / "optimizer.safetensors"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    console = Console(record=True, file=open(os.devnull, "w"), width=300)  # noqa: SIM115
    # The eight-step run had another schedule than `whole`: start from what both share, the data and the seed.
    resumed = Trainer(TrainConfig(**recipe), console)
    resumed.run()
    assert resumed.resumed_from.name == "step-000004"
    assert "broken checkpoint" in console.export_text()
    assert [r["step"] for r in records(recipe["out"])] == list(range(12))


def test_only_broken_checkpoints_is_an_error(recipe):
    Trainer(TrainConfig(**{**recipe, "steps": 4}), QUIET).run()
    for file in Path(recipe["out"], "checkpoints").glob("*/state.json"):
        file.unlink()
    with pytest.raises(BadInput, match="no checkpoint there can be read"):
        Trainer(TrainConfig(**recipe), QUIET).run()


def test_a_checkpoint_of_another_model_is_refused(recipe):
    Trainer(TrainConfig(**{**recipe, "steps": 4}), QUIET).run()
    recipe["model"]["moe_intermediate_size"] = 4
    with pytest.raises(BadInput, match=r"another model: .*proj"):
        Trainer(TrainConfig(**recipe), QUIET).run()


def test_divergence_stops_with_the_last_good_checkpoint(recipe, monkeypatch):
    trainer = Trainer(TrainConfig(**recipe), QUIET)
    real = trainer.loss
    count = []

    def explode(rows):
        count.append(1)
        loss, *rest = real(rows)
        return loss * (float("nan") if len(count) > 10 else 1), *rest

    monkeypatch.setattr(trainer, "loss", explode)
    with pytest.raises(BadInput, match=r"step 5: loss nan.*diverged.*step-000004.*lower lr"):
        trainer.run()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {}}, "model.model_type is missing"),
        ({"model": {"model_type": "qwen9"}}, "model.model_type: .*qwen9"),
        ({"model": {"model_type": "qwen3_moe", "num_expert": 4}}, "model.num_expert: .*did you mean num_experts"),
        ({"model": {"model_type": "qwen3_moe", "hidden_size": "x"}}, "model: .*hidden_size"),
        ({"model": {"model_type": "qwen3_moe", "vocab_size": 5}}, "model.vocab_size: 5 is less"),
        ({"seq_len": 65}, "seq_len: 65 is more than .*64"),
        ({"balance": {"swich": 1.0}}, "balance.swich: "),
        ({"balance": {"switch": {"coefficent": 1.0}}}, "balance.switch: .*coefficent"),
        ({"experts_implementation": "magic"}, "experts_implementation: "),
        ({"attention": "magic"}, "attention: "),
        ({"device": "warp"}, "device: warp"),
        ({"data": "/nowhere"}, "no such file or folder: /nowhere"),
        ({"tokenizer": "/nowhere"}, "tokenizer: no folder /nowhere"),
        ({"out": "/dev/null/x"}, "out: cannot make the folder"),
    ],
)
def test_fields_that_only_the_build_can_judge(recipe, changes, words):
    with pytest.raises(BadInput, match=words):
        Trainer(TrainConfig(**{**recipe, **changes}), QUIET)


def test_a_dense_model_trains_and_refuses_balance(recipe):
    dense = {
        k: v for k, v in recipe["model"].items() if "expert" not in k and k not in ("norm_topk_prob", "moe_intermediate_size")
    }
    recipe.update(model={**dense, "model_type": "qwen3"}, steps=3)
    with pytest.raises(BadInput, match=r"balance: switch, z .*no experts"):
        Trainer(TrainConfig(**recipe), QUIET)
    Trainer(TrainConfig(**{**recipe, "balance": {}}), QUIET).run()
    assert "max_vio" not in records(recipe["out"])[0]
