"""The table of tensors: what a checkpoint holds, byte by byte, and every way in which a folder can lie about it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from moesaic.core.errors import BadInput
from moesaic.store.reader import Reader
from moesaic.store.table import INDEX, SINGLE, Table

TENSORS = {
    "experts.gate_up_proj": torch.arange(24, dtype=torch.float32).view(3, 4, 2),
    "experts.0.up.weight": torch.arange(6).to(torch.bfloat16).view(2, 3),
    "bias": torch.arange(5).half(),
    "empty": torch.zeros(0, 4),
    "count": torch.tensor(7),
}


@pytest.fixture
def folder(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE)
    return tmp_path


@pytest.fixture
def shards(tmp_path):
    names = list(TENSORS)
    files = {f"model-{i}.safetensors": names[i::2] for i in (0, 1)}
    for file, held in files.items():
        save_file({name: TENSORS[name] for name in held}, tmp_path / file)
    write_index(tmp_path, {name: file for file, held in files.items() for name in held})
    return tmp_path


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_every_tensor_reads_back(kind, request):
    table = Table.of_folder(request.getfixturevalue(kind))
    assert set(table) == set(TENSORS)
    assert table.nbytes == sum(t.nbytes for t in TENSORS.values())
    with Reader("keep") as reader:
        for name, tensor in TENSORS.items():
            assert torch.equal(reader.read(table[name]), tensor), name


def test_rows_of_a_stacked_tensor(folder):
    stacked = Table.of_folder(folder)["experts.gate_up_proj"]
    with Reader("keep") as reader:
        for e in range(3):
            assert torch.equal(reader.read(stacked.rows(e, e + 1))[0], TENSORS["experts.gate_up_proj"][e])
    assert stacked.rows(1, 2).name == "experts.gate_up_proj[1]"
    with pytest.raises(BadInput, match=r"gate_up_proj \[3, 4, 2\] has no rows 3 to 4"):
        stacked.rows(3, 4)


def test_a_name_that_does_not_exist(folder):
    with pytest.raises(BadInput, match=r"no tensor nothing in .*model\.safetensors"):
        Table.of_folder(folder)["nothing"]


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
def test_an_index_cannot_leave_the_folder(shards, name):
    write_index(shards, {"bias": name})
    with pytest.raises(BadInput, match=r"bias to .* which is no file of this folder"):
        Table.of_folder(shards)


def test_a_missing_shard_and_a_missing_tensor(shards):
    write_index(shards, {"bias": "model-9.safetensors"})
    with pytest.raises(BadInput, match=r"model-9\.safetensors is missing: .* expects tensor bias"):
        Table.of_folder(shards)
    write_index(shards, {"other": "model-0.safetensors"})
    with pytest.raises(BadInput, match=r"model-0\.safetensors has no tensor other"):
        Table.of_folder(shards)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none(shards, text):
    (shards / INDEX).write_text(text)
    with pytest.raises(BadInput, match=r"index\.json is not a safetensors index"):
        Table.of_folder(shards)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(BadInput, match="has no weights that can be read by byte range"):
        Table.of_folder(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_truncated_file_names_itself(folder, keep):
    path = folder / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadInput, match=r"model\.safetensors is truncated") as caught:
        Table.of_folder(folder)
    if keep == -1:
        assert "tensor" in str(caught.value)


def write(folder, header, data=b"\0" * 64):
    raw = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return folder


def entry(first, last, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [last - first] if shape is None else shape, "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "tensors a and b overlap at byte"),
        ({"a": entry(0, 65)}, "truncated: tensor a ends at byte"),
        ({"a": entry(8, 4, [4])}, "tensor a claims bytes 8 to 4"),
        ({"a": entry(-4, 4, [8])}, "tensor a claims bytes -4 to 4"),
        ({"a": entry(0, 8, [9])}, r"tensor a has 8 bytes for U8 \[9\]"),
        ({"a": entry(0, 8, [2], "Q4")}, "tensor a is stored as Q4"),
        ({"a": {"dtype": "U8"}}, "tensor a has no valid entry"),
        ({"a": 3}, "tensor a has no valid entry"),
        ({"a": entry(0, 8, ["8"])}, "tensor a claims bytes"),
    ],
)
def test_a_header_that_lies(tmp_path, header, words):
    with pytest.raises(BadInput, match=words) as caught:
        Table.of_folder(write(tmp_path, header))
    assert SINGLE in str(caught.value)


@pytest.mark.parametrize("raw", [b"nonsense", b"[1,2]   ", b"\xff" * 8])
def test_a_header_that_is_no_json(tmp_path, raw):
    (tmp_path / SINGLE).write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(BadInput, match="corrupted"):
        Table.of_folder(tmp_path)
