"""Benchmarks of whole models, on a checkpoint of some megabytes: the same path, other numbers."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from moesaic.bench import decode, generated, stream
from moesaic.bench.contestants.process import Contestant, has_llama_cpp, model_command
from moesaic.bench.memory_limit import MemoryLimit
from moesaic.core.errors import BadInput
from moesaic.view import load

TINY = generated.SIZES["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


def test_a_generated_checkpoint_is_a_stock_one_of_the_stated_size(folder):
    path = generated.generate(folder / "tiny", TINY)
    model = load(path).model
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    norms = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 1)
    assert experts == TINY.bank_weights
    assert sum(p.numel() for p in model.parameters()) == TINY.bank_weights + TINY.other_weights + norms
    assert torch.isfinite(model(torch.arange(20)[None]).logits).all()
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert generated.generate(path, TINY) == path
    assert before == {file: file.stat().st_mtime_ns for file in path.iterdir()}
    with pytest.raises(BadInput, match="another size"):
        generated.generate(path, generated.Size(layers=1))


def test_an_interrupted_one_is_written_again(folder):
    path = folder / "broken"
    generated.generate(path, TINY)
    (path / generated.DONE).unlink()
    (path / "model-00001-of-00004.safetensors").write_bytes(b"half")
    load(generated.generate(path, TINY))


@pytest.mark.slow
def test_decode_compares_models_that_agree(folder):
    result = decode.run(
        decode.Options(
            folder, "tiny", ("moesaic", "eager", "llama.cpp BF16"), 1, prompt=8, steps=3, rounds=2, llama_python="no"
        )
    )
    assert [(row["impl"], row["case"]) for row in result["rows"]] == [
        (name, case) for name in ("moesaic", "transformers eager") for case in ("prefill", "decode")
    ]
    assert all(row["tokens_per_second"] > 0 and row["rounds"] == 2 for row in result["rows"])
    assert result["tops"]["moesaic"][0] == result["tops"]["transformers eager"][0]
    assert any(note.startswith("llama.cpp") for note in result["notes"])


@pytest.mark.slow
def test_stream_ends_with_the_resident_numbers(folder):
    options = stream.Options(
        folder, "tiny", (0.5,), ("moesaic", "accelerate"), ("lru", "none"), 1, warm=2, steps=4, slow_steps=2
    )
    result = stream.run(options)
    ours = [row for row in result["rows"] if "exact" in row]
    assert len(ours) == 2 and all(row["exact"] for row in ours)
    assert ours[0]["hit_rate"] > ours[1]["hit_rate"] == 0
    assert ours[1]["read_bytes_per_token"] == TINY.layers * TINY.slots * 2 * TINY.expert_weights
    peers = [row["impl"] for row in result["rows"] if row["impl"] == "accelerate"]
    if find_spec("accelerate"):
        assert peers == ["accelerate"]
    else:  # said, and nothing else is lost for it
        assert not peers and any("accelerate" in note for note in result["notes"])


def test_a_contestant_that_fails_says_why(tmp_path):
    with pytest.raises(BadInput, match="nothing here"):
        Contestant("nobody", [sys.executable, "-c", "raise SystemExit('nothing here')"])
    with pytest.raises(BadInput, match=r"streamed: .*config\.json"):
        Contestant("streamed", model_command(tmp_path, 1, "streamed", resident=0.5))
    assert "no llama_cpp" in has_llama_cpp(sys.executable) or has_llama_cpp(sys.executable) is None


def test_a_memory_limit_is_one():
    why = MemoryLimit.unavailable()
    if why:
        pytest.skip(why)
    with MemoryLimit(64 << 20) as limit:
        script = "x = bytearray({} << 20); x[::4096] = b'1' * len(x[::4096]); print(len(x))"
        small, large = (
            subprocess.run(limit.prefixed([sys.executable, "-c", script.format(size)]), capture_output=True, text=True)
            for size in (8, 256)
        )
        assert small.stdout.strip() == str(8 << 20)
        assert large.returncode != 0 and not large.stdout
    assert not limit.group.exists()


@pytest.mark.parametrize("wrong", [{"size": "huge"}, {"prompt": 0}])
def test_decode_names_a_bad_option(tmp_path, wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        decode.run(decode.Options(tmp_path, **wrong))


@pytest.mark.parametrize("wrong", [{"size": "huge"}, {"shares": (0.0,)}, {"peers": ("ollama",)}])
def test_stream_names_a_bad_option(tmp_path, wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        stream.run(stream.Options(tmp_path, **wrong))
