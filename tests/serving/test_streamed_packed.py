"""Packed folders: the same logits as the checkpoint, whoever loads them; and whatever breaks a packing off leaves no model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from moesaic.core.errors import BadInput
from moesaic.kernels.low_bits import Packing, dequantize_matrix, quantize_matrix
from moesaic.serving.streamed import load_streamed
from moesaic.serving.streamed.bits import Bits, by_usage
from moesaic.serving.streamed.packing import pack, plan_packing
from moesaic.store import ReadFailed
from moesaic.store.packed import expert_files, read_packed
from moesaic.view import load, quiet, tiny, view
from moesaic.view.coverage import first_floats

FAST = ["gpt_oss", "ernie4_5_vl_moe", "inkling2", "qwen3_moe"]
"""Stacked, biased, transposed and interleaved; per expert, two banks in one list; rows permuted; plain."""

ODD_FLOATS = {"openai_privacy_filter", "qwen3_omni_moe"}
"""Their tiny models do not run in bfloat16, streamed or not."""


@pytest.fixture(autouse=True)
def silent():
    with quiet():
        yield


def run(model, inputs):
    with torch.no_grad():
        return first_floats(model(**inputs))


def check(name, folder, dtypes):
    """The packed copy, resident and streamed, gives the logits of the resident original in each dtype."""
    architecture = next(a for a in tiny.architectures() if a.name == name)
    for number, model_class in enumerate(tiny.model_classes(architecture)):
        source, out = folder / f"model{number}", folder / f"packed{number}"
        model = tiny.build(model_class)
        model.save_pretrained(source)
        inputs = tiny.inputs(model)
        assert pack(source, out, most_file_bytes=60_000).lossless
        for dtype in dtypes:
            expected = run(load(source, dtype=dtype).model, inputs)
            assert torch.isfinite(expected).all()
            whole = load(out, dtype=dtype).model
            assert type(whole) is model_class
            assert torch.equal(run(whole, inputs), expected), (model_class, dtype, "resident")
            with load_streamed(out, resident=0.4, dtype=dtype) as streamed:
                for _ in range(2):
                    assert torch.equal(run(streamed.model, inputs), expected), (model_class, dtype, "streamed")


@pytest.mark.parametrize("name", FAST)
def test_logits_are_bitwise_equal(name, tmp_path):
    check(name, tmp_path, ["auto"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [a.name for a in tiny.architectures()])
def test_every_architecture_is_bitwise_equal(name, tmp_path):
    check(name, tmp_path, ["auto"] if name in ODD_FLOATS else ["auto", "bfloat16"])


def build(folder, width=512, inner=256):
    """Two layers of eight experts in bf16, large enough for the compiled passes unless told otherwise."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=300, hidden_size=width, intermediate_size=64, moe_intermediate_size=inner, num_hidden_layers=2,
        num_experts=8, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts_per_tok=2, initializer_range=0.1,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def answered(folder):
    """A checkpoint, and the answer of the resident model."""
    ids = torch.randint(0, 300, (1, 33))
    return SimpleNamespace(folder=folder, ids=ids, logits=run(load(folder).model, {"input_ids": ids}))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint, its answer, and its packed copy."""
    found = answered(build(tmp_path_factory.mktemp("original")))
    found.packed = tmp_path_factory.mktemp("packed") / "out"
    pack(found.folder, found.packed, most_file_bytes=5 << 20)
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Less to round."""
    return answered(build(tmp_path_factory.mktemp("small"), 128, 64))


@pytest.mark.parametrize("mode", ["direct", "keep"])
def test_the_compiled_passes_read_each_expert_at_once(checkpoint, mode):
    with load_streamed(checkpoint.packed, resident=0.4, page_cache=mode) as streamed:
        assert torch.equal(run(streamed.model, {"input_ids": checkpoint.ids}), checkpoint.logits)
        stats = streamed.stats
        assert not streamed.engine.layers[0].aside
        assert stats.reads == stats.accesses - stats.hits
        assert stats.read_bytes == stats.reads * streamed.engine.layers[0].bytes_E[0]


def test_what_lies_in_the_files(checkpoint):
    """Valid safetensors, records on multiples of 4096, and in them the very bytes of the matrices."""
    files = expert_files(checkpoint.packed)
    assert [f.name for f in files] == [f"experts-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2 and all(f.stat().st_size <= (5 << 20) + 8192 for f in files)
    blocks, seen = view(load(checkpoint.folder).model), 0
    for path in files:
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata()
            assert metadata["format"] == "moesaic.packed"
            assert json.loads(metadata["contents"])["blocks"][0]["bits"] == [16] * 8
            for name in stored.keys():  # noqa: SIM118
                layer, e = int(name.split(".")[2]), int(name.split(".")[-1])
                experts = blocks[layer].experts
                wanted = torch.cat([experts.gate_up_proj[e].flatten(), experts.down_proj[e].flatten()]).view(torch.uint8)
                assert torch.equal(stored.get_tensor(name)[: wanted.numel()], wanted)
                seen += 1
    assert seen == 16
    packed = read_packed(checkpoint.packed)
    starts = [packed.matrix(block, e, 0).start for block, e in packed.contents.records()]
    assert all(start % 4096 == 0 for start in starts)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rounded_experts(small, tmp_path, bits):
    """Streamed and resident are equal to the last bit, and hold what the kernels' own rounding gives."""
    plan = pack(small.folder, tmp_path / "out", bits=Bits(bits), group_size=32)
    assert not plan.lossless
    assert plan.expert_bytes <= 16 * (3 * 128 * 64 * (bits + 16 / 32) / 8 + 4096)
    model = load(tmp_path / "out", experts="grouped_mm").model
    original, packing = load(small.folder).model, Packing(bits, 32)
    for which in ("gate_up_proj", "down_proj"):
        weight = getattr(view(original)[1].experts, which)[5]
        wanted = dequantize_matrix(quantize_matrix(weight, packing), packing, tuple(weight.shape))
        assert torch.equal(getattr(view(model)[1].experts, which)[5], wanted.bfloat16())
    whole = load(tmp_path / "out").model
    with load_streamed(tmp_path / "out", resident=0.4) as streamed:
        logits = run(streamed.model, {"input_ids": small.ids})
        assert torch.equal(logits, run(whole, {"input_ids": small.ids}))
        one = {"input_ids": small.ids[:, :1]}  # few rows, another pass
        assert torch.equal(run(streamed.model, one), run(whole, one))
        layer = streamed.engine.layers[0]
        assert layer.bytes_E == [sum(plan.contents.blocks[0].sizes[bits])] * 8  # slots hold the records
        slots = streamed.engine._slots[layer.kinds[0]]
        assert streamed.engine.held_bytes <= streamed.engine.plan.budget_bytes + slots.count * 256
        assert streamed.engine.shape.total_bytes == 16 * layer.bytes_E[0]
    error = (logits.float() - small.logits.float()).norm() / small.logits.float().norm()
    assert 0 < error < {8: 0.05, 4: 0.4, 2: 2.0}[bits]


def test_rounded_experts_of_a_transposed_bank(tmp_path):
    architecture = next(a for a in tiny.architectures() if a.name == "gpt_oss")
    model = tiny.build(tiny.model_classes(architecture)[0])
    model.save_pretrained(tmp_path / "model")
    inputs = tiny.inputs(model)
    expected = run(load(tmp_path / "model").model, inputs)
    pack(tmp_path / "model", tmp_path / "out", bits=Bits(8), group_size=32)
    error = (run(load(tmp_path / "out").model, inputs) - expected).norm() / expected.norm()
    assert 0 < error < 0.05
    assert view(load(tmp_path / "out").model)[0].bank.transposed


def test_mixed_bits(small, tmp_path):
    name = "model.layers.1.mlp.experts"
    plan = pack(small.folder, tmp_path / "out", bits=Bits({"default": 4, name: 8, f"{name}.3": 16}))
    assert [block.bits_E for block in plan.contents.blocks] == [(4,) * 8, (8, 8, 8, 16, 8, 8, 8, 8)]
    ours, theirs = (view(load(folder).model)[1].bank for folder in (tmp_path / "out", small.folder))
    assert torch.equal(ours[3].gate, theirs[3].gate)
    assert not torch.equal(ours[2].gate, theirs[2].gate)
    expected = run(load(tmp_path / "out").model, {"input_ids": small.ids})
    with load_streamed(tmp_path / "out", resident=0.4) as streamed:
        got = run(streamed.model, {"input_ids": small.ids})
    assert (got.float() - expected.float()).norm() <= 0.05 * expected.float().norm()


def test_bits_by_usage():
    usage = np.array([[9, 1, 5, 0], [7, 2, 0, -1]])
    assert by_usage(usage, 4).tolist() == [[4] * 4] * 2
    assert (by_usage(usage, 16) == 16).all()
    chosen = by_usage(usage, 4 + 4 * 3 / 7)  # three of seven experts in 8 bits
    assert chosen.tolist() == [[8, 4, 8, 4], [8, 4, 4, 4]]
    with pytest.raises(BadInput, match="give the mean number of bits"):
        Bits(1, usage)
    with pytest.raises(BadInput, match="trace has 3 experts in block 1, the model has 4"):
        Bits(5, usage).of("x", 1, 4, 16)


def test_what_is_refused(checkpoint, tmp_path):
    def refused(words, folder=checkpoint.folder, out=tmp_path / "out", **how):
        with pytest.raises(BadInput, match=words):
            pack(folder, out, **how)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()

    with pytest.raises(BadInput, match="3 for default: give 16"):
        Bits(3)
    refused("no experts nothing", bits=Bits({"default": 4, "nothing": 8}))
    refused("is packed already", folder=checkpoint.packed)
    refused("lies inside the model", out=checkpoint.folder / "inner")
    refused("is not empty", out=checkpoint.folder)
    refused("is there and is no folder", out=checkpoint.folder / "config.json")


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    folder = build(tmp_path / "model", 128, 64)
    with safe_open(folder / "model.safetensors", "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    tensors["model.layers.1.mlp.experts.6.down_proj.weight"][3, 5] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"layers\.1\.mlp\.experts\.6: rows 0 to \d+ hold weights that are not finite"):
        pack(folder, tmp_path / "out", bits=Bits(4))
    assert not (tmp_path / "out").exists()


SCRIPT = """
import os, resource, signal, sys
from moesaic.serving.streamed.packing import pack
kind, folder, out = sys.argv[1:]
def progress(done, total):
    if kind == "kill" and done > total * 0.6:
        os.kill(os.getpid(), signal.SIGKILL)
if kind == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
pack(folder, out, progress=progress)
"""


def broken_off(kind, folder, out):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, str(folder), str(out)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_kill_leaves_nothing_that_is_taken_for_a_model(checkpoint, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    assert broken_off("kill", checkpoint.folder, out).returncode == -signal.SIGKILL
    assert not out.exists()
    for open_it in (lambda: load(partial), lambda: load_streamed(partial, resident=0.5)):
        with pytest.raises(BadInput, match=r"no config\.json"):
            open_it()
    with pytest.raises(BadInput, match="broken off: go on with --resume, or delete it"):
        pack(checkpoint.folder, out)
    with pytest.raises(BadInput, match="begun from another model, or with other options"):
        pack(checkpoint.folder, out, bits=Bits(8), resume=True)
    steps = []
    pack(checkpoint.folder, out, resume=True, progress=lambda done, total: steps.append(done / total))
    assert steps[0] > 0.5  # what was written was not written again
    assert not partial.exists()
    pack(checkpoint.folder, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("damage", ["flip", "cut", "log"])
def test_a_damaged_beginning_is_written_again(checkpoint, tmp_path, damage):
    out, partial = tmp_path / "out", tmp_path / "out.partial"

    def interrupt(done, total):
        if done > total * 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(checkpoint.folder, out, progress=interrupt)
    path = expert_files(partial)[0]
    if damage == "flip":
        with path.open("r+b") as stream:
            stream.seek(3 << 20)
            byte = stream.read(1)
            stream.seek(3 << 20)
            stream.write(bytes([byte[0] ^ 1]))
    elif damage == "cut":
        os.truncate(path, 4 << 20)
    else:
        (partial / "packing.log").write_text("nonsense\n")
    steps = []
    pack(checkpoint.folder, out, resume=True, progress=lambda done, total: steps.append(done / total))
    assert steps[0] < 0.5
    pack(checkpoint.folder, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.slow
def test_a_disk_that_is_full(checkpoint, tmp_path):
    """A limit on the size of files stands for it: the write fails in the middle of a record."""
    out = tmp_path / "out"
    done = broken_off("limit", checkpoint.folder, out)
    assert done.returncode == 1
    assert "BadInput: cannot write" in done.stderr and "go on with --resume, or delete it" in done.stderr
    assert not out.exists()
    pack(checkpoint.folder, out, resume=True)
    assert torch.equal(run(load(out).model, {"input_ids": checkpoint.ids}), checkpoint.logits)


def test_too_little_room_is_known_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(BadInput, match=r"has 1000 B free, the packing takes"):
        pack(checkpoint.folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_record_cut_short_while_serving(checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint.packed, folder)
    with load_streamed(folder, resident=0.2, policy="none") as streamed:
        assert torch.equal(run(streamed.model, {"input_ids": checkpoint.ids}), checkpoint.logits)
        path = expert_files(folder)[0]
        whole = path.read_bytes()
        os.truncate(path, 1 << 20)
        with pytest.raises(ReadFailed, match=r"experts-00001-of-\d+\.safetensors at byte .*mlp\.experts\.\d.* cut short"):
            run(streamed.model, {"input_ids": checkpoint.ids})
        other = tmp_path / "again"
        other.write_bytes(whole)
        os.replace(other, path)  # as a download does: another file in its place
        with pytest.raises(ReadFailed):  # found out by the read that fails
            run(streamed.model, {"input_ids": checkpoint.ids})
        assert torch.equal(run(streamed.model, {"input_ids": checkpoint.ids}), checkpoint.logits)


def test_a_packing_of_another_model_is_named(checkpoint, tmp_path):
    shutil.copytree(checkpoint.packed, tmp_path / "mixed")
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    for change, words in (
        ({"num_hidden_layers": 3}, "has no experts for model.layers.2.mlp.experts.gate_up_proj"),
        ({"moe_intermediate_size": 128}, r"are \[8, 512, 512\], the model wants \[8, 256, 512\]"),
    ):
        (tmp_path / "mixed" / "config.json").write_text(json.dumps(config | change))
        for open_it in (load, lambda folder: load_streamed(folder, resident=0.5)):
            with pytest.raises(BadInput, match=words):
                open_it(tmp_path / "mixed")


def test_a_plan_reads_no_weights(checkpoint, monkeypatch):
    from moesaic.store import Reader

    monkeypatch.setattr(Reader, "fetch", lambda *args, **kwargs: pytest.fail("a weight was read"))
    plan = plan_packing(checkpoint.folder)
    assert plan.bytes_before == plan.bytes_after  # experts of a multiple of 4096 bytes
    assert plan.lossless


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_file_system_that_runs_full_leaves_no_model_and_goes_on_with_room(checkpoint, small_disk, monkeypatch):
    """Really full: what was free at the beginning is not free any more when the records come."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))
    out = small_disk / "out"
    with pytest.raises(BadInput, match=r"cannot write .*No space left on device.*go on with --resume, or delete it"):
        pack(checkpoint.folder, out)
    assert not out.exists() and (small_disk / "out.partial").is_dir()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    pack(checkpoint.folder, out, resume=True)
    assert torch.equal(run(load(out).model, {"input_ids": checkpoint.ids}), checkpoint.logits)
