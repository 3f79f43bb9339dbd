"""`moesaic.load`: what it gives, and one clear error for each way a checkpoint can be bad."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moesaic
from moesaic.core.errors import BadInput, NotMoE
from moesaic.view import load as load_function
from moesaic.view import resolve_model


@pytest.fixture
def folder(tiny_moe, tmp_path) -> Path:
    """A copy of a good checkpoint, to be spoilt."""
    return Path(shutil.copytree(tiny_moe, tmp_path / "model"))


@pytest.fixture
def sharded(tiny_moe, tmp_path) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_moe)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="12KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def refused(folder, pattern, **options):
    with pytest.raises(BadInput, match=pattern) as caught:
        moesaic.load(folder, **options)
    assert len(str(caught.value).splitlines()) == 1, "an error is one line"


def test_load_gives_a_model_with_our_kernels_and_a_tokenizer(folder, ids):
    model, tokenizer = moesaic.load(folder)
    assert model.config._experts_implementation == "moesaic"
    assert not model.training
    assert len(tokenizer.encode("expert")) > 0
    assert len(moesaic.view(moesaic.load(str(folder)))) == 2
    stock, _ = load_function(folder, experts="eager", attention="eager")
    assert stock.config._attn_implementation == "eager"
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-5)


def test_sharded_and_without_tokenizer(sharded, tiny_moe, ids):
    loaded = moesaic.load(sharded)
    assert loaded.tokenizer is None
    with torch.no_grad():
        whole = moesaic.load(tiny_moe).model(ids).logits
        torch.testing.assert_close(loaded.model(ids).logits, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("float16", torch.float16), (torch.float64, torch.float64)]
)
def test_dtypes(folder, name, dtype):
    assert next(moesaic.load(folder, dtype=name).model.parameters()).dtype is dtype


def test_unknown_dtype(folder):
    for bad in ("float99", "int8", "Tensor"):
        refused(folder, f"unknown dtype '{bad}': one of auto, float32", dtype=bad)


def test_paths_that_are_not_models(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(tmp_path / "nowhere", "no such model folder: .*nowhere")
    refused("./nowhere", "no such model folder")
    refused("a/b/c", "no such model folder")
    refused("nobody/no-such-model-here", "HF_HUB_OFFLINE is set")
    refused(folder / "config.json", "is a file: name the model folder")
    refused(tmp_path, "has no config.json: not a model folder")


def test_a_local_folder_is_never_looked_up_on_the_hub(folder, monkeypatch):
    import socket

    def no_network(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    moesaic.load(folder)


def test_bad_configurations(folder):
    (folder / "config.json").write_text("{not json")
    refused(folder, r"config\.json is not JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "must hold a JSON object")
    (folder / "config.json").write_text('{"model_type": "no_such_moe"}')
    refused(folder, "unknown architecture 'no_such_moe'")


def test_a_truncated_shard_names_file_and_tensor(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    last = max((entry["data_offsets"][1], name) for name, entry in header.items() if name != "__metadata__")[1]
    path.write_bytes(whole[:-10])
    refused(folder, rf"model\.safetensors is truncated: tensor {last} ends at byte")
    path.write_bytes(whole[:100])
    refused(folder, r"model\.safetensors is truncated or not safetensors: its header")
    path.write_bytes(whole[:5])
    refused(folder, "less than a safetensors header")


def test_a_corrupted_header_is_named(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:8] + b"#" * 40 + whole[48:])
    refused(folder, r"model\.safetensors is corrupted: its header is not valid")
    wrong = whole.replace(b'"shape":[16]', b'"shape":[17]', 1)
    assert wrong != whole
    path.write_bytes(wrong)
    refused(folder, r"corrupted: tensor .*norm.* has 64 bytes for F32 \[17\]")


def test_missing_and_wrong_tensors_are_named(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("gate.weight"))
    save_file({key: value for key, value in tensors.items() if key != name}, path, metadata={"format": "pt"})
    refused(folder, rf"no tensor {name} \(1 missing\)")
    save_file({**tensors, name: torch.zeros(3, 16)}, path, metadata={"format": "pt"})
    refused(folder, "cannot load|mismatch")


def test_missing_shards_are_named(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    name, file = next(iter(index["weight_map"].items()))
    other = next(f for f in index["weight_map"].values() if f != file)
    index["weight_map"][name] = other
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(sharded, rf"{other} has no tensor {name}")
    (sharded / file).unlink()
    refused(sharded, rf"{file} is missing: model\.safetensors\.index\.json expects|has no tensor")
    (sharded / "model.safetensors.index.json").write_text("{}")
    refused(sharded, "is not a safetensors index")


def test_pickles_are_refused_unless_allowed(folder, ids):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    refused(folder, "has no weights: expected model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    refused(folder, r"pytorch_model\.bin is a pickle.*allow_pickle=True")
    assert len(moesaic.view(moesaic.load(folder, allow_pickle=True))) == 2


def test_dense_models_are_refused_unless_allowed(tiny_dense):
    with pytest.raises(NotMoE, match="is a Qwen3ForCausalLM, which has no Mixture-of-Experts block"):
        moesaic.load(tiny_dense)
    assert moesaic.load(tiny_dense, dense_ok=True).model is not None


def test_a_dense_model_is_refused_before_its_weights_are_read(tiny_dense, monkeypatch):
    from transformers import Qwen3ForCausalLM

    monkeypatch.setattr(Qwen3ForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(NotMoE):
        moesaic.load(tiny_dense)


def test_bad_devices_are_named(folder):
    refused(folder, "device nothing", device="nothing")


def test_bundled_is_a_folder_or_says_what_to_do():
    from importlib import resources

    if (Path(str(resources.files("moesaic"))) / "models" / "bundled" / "config.json").is_file():
        assert (Path(resolve_model("bundled")) / "config.json").is_file()
    else:
        with pytest.raises(BadInput, match="bundled model is not installed"):
            resolve_model("bundled")


def test_a_saved_replacement_reloads_in_stock_transformers(folder, tmp_path, ids):
    """Through the view: replace, save, and stock transformers gives the same logits."""
    from transformers import AutoModelForCausalLM

    model = moesaic.load(folder, experts="eager").model
    bank = moesaic.view(model)[1].bank
    bank[0], bank[1] = bank[1], bank[0].map(torch.neg)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-6)
        original = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")(ids).logits
        assert not torch.allclose(again(ids).logits, original)
