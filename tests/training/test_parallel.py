"""Two processes train as one does: the same losses, one checkpoint, and weights that one process loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from moesaic.core.errors import BadInput
from moesaic.training import parallel
from moesaic.training.config import TrainConfig
from moesaic.training.processes import Processes
from moesaic.training.trainer import Trainer

QUIET = Console(quiet=True)
MODEL = {
    "model_type": "moesaic", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "experts": 5, "k": 2,
    "expert_width": 12, "max_position_embeddings": 64,
}  # fmt: skip
TWO = "import sys; from torch.distributed.run import main; sys.exit(main(sys.argv[1:]))"


def torchrun(recipe, tmp_path, *arguments, processes=2):
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-c", TWO, f"--nproc-per-node={processes}", "--standalone", "-m", "moesaic", "train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=300, check=False)


def losses(out):
    return [json.loads(line)["loss"] for line in Path(out, "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields", "balance", "accumulate"),
    [
        ("ddp", {}, {"switch": 0.05, "bias": 0.01}, 2),
        ("fsdp", {}, {"switch": 0.05, "bias": 0.01}, 2),
        ("fsdp", {"router": "rmoe"}, {}, 1),  # whose layers share a module
    ],
)
def test_two_processes_are_one(recipe, tmp_path, kind, fields, balance, accumulate):
    """Sparse experts (some without a token in one of the processes), tied embeddings, micro-steps, a controller."""
    scope = {"balance_scope": "data_parallel"} if balance else {}
    recipe = {
        **recipe, "model": {**MODEL, **fields}, "balance": balance, "parallel": kind, "accumulate": accumulate,
        "batch_size": 4, "experts_implementation": "moesaic", "threads": 1, **scope,
    }  # fmt: skip
    alone = {**recipe, "out": str(tmp_path / "alone")}
    Trainer(TrainConfig(**alone), QUIET).run()
    done = torchrun(recipe, tmp_path, "--set", "steps=8", "--set", "warmup=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("8 steps") == 1, "one process speaks"
    done = torchrun(recipe, tmp_path)  # goes on: shards are read as well as written
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("wrote ") == 1, "one process writes"
    assert [json.loads(line)["step"] for line in Path(recipe["out"], "log.jsonl").read_text().splitlines()] == list(range(12))
    assert losses(recipe["out"])[:2] == pytest.approx(losses(alone["out"])[:2], rel=1e-5)
    ours, theirs = (load_file(Path(run["out"], "final", "model.safetensors")) for run in (recipe, alone))
    assert ours.keys() == theirs.keys()
    # A run cut at step 8 had the schedule of eight steps; the same cut alone must have come to the same place.
    again = {**recipe, "out": str(tmp_path / "again")}
    Trainer(TrainConfig(**{**again, "steps": 8, "warmup": 2}), QUIET).run()
    Trainer(TrainConfig(**again), QUIET).run()
    assert losses(recipe["out"]) == pytest.approx(losses(again["out"]), rel=2e-4)
    one = load_file(Path(again["out"], "final", "model.safetensors"))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, one[name], rtol=2e-2, atol=2e-3, msg=name)
    # What two processes wrote, one process reads and ends.
    Path(recipe["out"], "log.jsonl").rename(tmp_path / "old.jsonl")
    longer = Trainer(TrainConfig(**{**recipe, "steps": 14}), QUIET)
    longer.run()
    assert longer.resumed_from is not None and longer.resumed_from.name == "step-000012"


def test_one_process_needs_no_group(recipe):
    processes, device = Processes.join("cpu")
    assert (processes.rank, processes.world, device) == (0, 1, "cpu")
    assert processes.mean([1.5, 2.0]) == [1.5, 2.0]
    processes.wait()
    tensor = torch.ones(2)
    assert parallel.whole(tensor) is tensor and parallel.cut_like(tensor, torch.zeros(2)) is tensor


def test_spawning_is_refused_where_experts_are_in_pieces(recipe, monkeypatch):
    monkeypatch.setattr(Processes, "join", classmethod(lambda cls, device: (cls(0, 2), device)))
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    fields = {"model": MODEL, "parallel": "fsdp", "spawn": {"at": 3}, "balance": {}}
    with pytest.raises(BadInput, match="spawn: copies whole experts"):
        Trainer(TrainConfig(**{**recipe, **fields}), QUIET)


def test_a_batch_that_does_not_divide_is_refused(recipe, monkeypatch):
    monkeypatch.setattr(Processes, "join", classmethod(lambda cls, device: (cls(0, 3), device)))
    with pytest.raises(BadInput, match="batch_size: 4 does not divide among 3 processes"):
        Trainer(TrainConfig(**{**recipe, "batch_size": 4}), QUIET)
