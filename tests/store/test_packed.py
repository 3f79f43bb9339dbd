"""Packed folders that lie: every claim of a header is checked before a byte of a record is used."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from moesaic.core.errors import BadInput
from moesaic.store import Reader, Table
from moesaic.store.packed import Block, Contents, read_packed
from moesaic.store.record_writer import RecordWriter
from moesaic.store.slots import LINE
from moesaic.store.table import INDEX, read_metadata
from moesaic.store.writing import copy_tensors, header, shards

BLOCK = Block(
    "m.experts", "m.experts", torch.float32, ((6, 4), (4, 3)), False, (16, 0), (32, 32, 8), {32: (96, 48), 8: (64, 64)}
)


def write(folder, contents, **how):
    """All records of a packing, the bytes of record n all n."""
    with RecordWriter(folder, contents, "test", **how) as writer:
        for number, place in enumerate(writer.left):
            writer.append(np.full(place.nbytes, number, np.uint8))
        writer.finish()
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "p", Contents("test", 32, (BLOCK,)), most=9000)


def rewrite(folder, change, tensors=lambda header: None, number=1):
    """Change the contents of one file's metadata, or its tensors, and leave the data where it is."""
    path = sorted(folder.iterdir())[number - 1]
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    found = json.loads(raw[8 : 8 + size])
    contents = json.loads(found["__metadata__"]["contents"])
    change(contents)
    found["__metadata__"]["contents"] = json.dumps(contents)
    tensors(found)
    text = json.dumps(found).encode()
    assert len(text) <= size, "the header has no room for it"
    path.write_bytes(raw[:8] + text.ljust(size) + raw[8 + size :])
    return path


def test_records_read_back(folder):
    packed = read_packed(folder)
    assert len(list(folder.iterdir())) == 2
    (block,) = packed.contents.blocks
    assert block == BLOCK
    with Reader("keep") as reader:
        for e in range(3):
            for which in (0, 1):
                stored = packed.matrix(block, e, which)
                assert stored.start % 4096 == (BLOCK.sizes[BLOCK.bits_E[e]][0] if which else 0)
                assert (reader.read(stored).view(torch.uint8) == e).all()
    assert packed.matrix(block, 0, 1).shape == (4, 3) and packed.matrix(block, 0, 1).dtype == torch.float32
    assert packed.matrix(block, 2, 1).shape == (64,) and packed.matrix(block, 2, 1).dtype == torch.uint8


def test_files_are_safetensors(folder):
    for path in folder.iterdir():
        with safe_open(path, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                assert stored.get_tensor(name).unique().numel() == 1
        assert read_metadata(path)["format"] == "moesaic.packed"


def test_an_ordinary_folder_is_not_packed(tmp_path):
    (tmp_path / "experts-1.safetensors").write_bytes(b"")
    assert read_packed(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["blocks"][0].update(bits=[32, 32, 3]), "has experts of 3 bits; F32 experts have 32, 8, 4 or 2"),
        (lambda c: c["blocks"][0].update(bits=[32, 32, 4]), "has experts of 4 bits"),
        (lambda c: c["blocks"][0].update(bits=[]), "has shapes"),
        (lambda c: c["blocks"][0].update(dtype="I8"), "is of dtype 'I8'"),
        (lambda c: c["blocks"][0].update(dtype="BF16"), "has experts of 32 bits"),
        (lambda c: c["blocks"][0].update(shapes=[[6, 4], [4]]), r"has shapes \[\[6, 4\], \[4\]\]"),
        (lambda c: c["blocks"][0].update(shapes=[[6, 5], [4, 3]]), r"has \(96, 48\) bytes for matrices"),
        (lambda c: c["blocks"][0].update(shifts=[-4, 0]), "shifts"),
        (lambda c: c["blocks"][0].update(records="n"), "shares the records of n, which do not fit it"),
        (lambda c: c["blocks"][0]["sizes"].update({"8": [64, 8000]}), "record m.experts.2 has 4096 bytes .* should have 8192"),
        (lambda c: c["blocks"][0].update(bits=[32, 32]), "m.experts.2 is no record of this packing"),
        (lambda c: c["blocks"][0].pop("sizes"), "its contents cannot be read"),
        (lambda c: c.pop("blocks"), "its contents cannot be read"),
    ],
)
def test_contents_that_lie(tmp_path, change, words):
    folder = write(tmp_path / "p", Contents("test", 32, (BLOCK,)))
    path = rewrite(folder, change)
    with pytest.raises(BadInput, match=words) as caught:
        read_packed(folder)
    assert str(folder) in str(caught.value) and path.exists()


def test_records_that_lie(tmp_path):
    folder = write(tmp_path / "p", Contents("test", 32, (BLOCK,)))

    def shorter(found):
        for name, (first, last) in {"m.experts.0": (0, 4000), "m.experts.1": (4000, 8192)}.items():
            found[name].update(shape=[last - first], data_offsets=[first, last])

    rewrite(folder, lambda c: None, shorter)
    with pytest.raises(BadInput, match=r"record m\.experts\.0 has 4000 bytes of U8, and should have 4096"):
        read_packed(folder)

    def elsewhere(found):
        found["m.experts.0"].update(shape=[4096], data_offsets=[8, 4104])
        found["m.experts.1"].update(shape=[4096], data_offsets=[4104, 8200])
        found["m.experts.2"].update(shape=[4088], data_offsets=[8200, 12288])

    rewrite(folder, lambda c: None, elsewhere)
    with pytest.raises(BadInput, match=r"record m\.experts\.0 begins at byte \d+, which is no multiple of 4096"):
        read_packed(folder)

    def signed(found):
        for e in range(3):
            found[f"m.experts.{e}"].update(shape=[4096], data_offsets=[4096 * e, 4096 * (e + 1)], dtype="I8")

    rewrite(folder, lambda c: None, signed)
    with pytest.raises(BadInput, match="has 4096 bytes of I8"):
        read_packed(folder)
    rewrite(folder, lambda c: None, lambda found: found.pop("m.experts.0"))
    with pytest.raises(BadInput, match=r"no file of experts has the record m\.experts\.0"):
        read_packed(folder)


def test_files_that_do_not_belong_together(folder, tmp_path):
    second = folder / "experts-00002-of-00002.safetensors"
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(BadInput, match=r"experts-00002-of-00002\.safetensors is missing"):
        read_packed(folder)
    second.write_bytes(kept[:-1])
    with pytest.raises(BadInput, match=r"is truncated: tensor m\.experts\.2 ends at byte"):
        read_packed(folder)
    second.write_bytes(kept)
    rewrite(folder, lambda c: c.update(model="x"), number=2)
    with pytest.raises(BadInput, match=r"experts-00002-of-00002\.safetensors is of another packing"):
        read_packed(folder)
    second.write_bytes(kept)
    (folder / "experts-00001-of-00003.safetensors").write_bytes(kept)
    with pytest.raises(BadInput, match=r"experts-00001-of-00003\.safetensors is of another packing"):
        read_packed(folder)


def test_a_file_of_experts_that_is_of_someone_else(tmp_path):
    head = header([("x", torch.uint8, (0,))], {"format": "pt"}, 64)
    (tmp_path / "experts-00001-of-00001.safetensors").write_bytes(head)
    with pytest.raises(BadInput, match="no file of experts that can be read here: format 'pt'"):
        read_packed(tmp_path)


def test_two_blocks_that_share_records(tmp_path):
    other = Block(**{**BLOCK.__dict__, "name": "n.experts"})
    packed = read_packed(write(tmp_path / "p", Contents("test", 32, (BLOCK, other))))
    ours, theirs = packed.contents.blocks
    assert packed.matrix(theirs, 1, 0) == packed.matrix(ours, 1, 0)


def test_copies_begin_where_in_a_cache_line_the_originals_do(tmp_path):
    """Tensors of odd sizes, between which others were taken out."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(int(torch.randint(1, 40, ()))) for i in range(30)}
    save_file(tensors, tmp_path / "a.safetensors")
    table = Table.of_files([tmp_path / "a.safetensors"])
    kept = [stored for i, stored in enumerate(table.values()) if i % 3]
    out = tmp_path / "out"
    out.mkdir()
    steps = []
    with Reader("keep") as reader:
        paths = copy_tensors(kept, out, reader, 1500, steps.append)
        assert sum(steps) == sum(stored.nbytes for stored in kept)
        copied = Table.of_folder(out)
        assert (out / INDEX).is_file() and len(paths) > 1
        assert set(copied) == {stored.name for stored in kept}
        for stored in kept:
            assert copied[stored.name].start % LINE == stored.start % LINE
            assert torch.equal(reader.read(copied[stored.name]), tensors[stored.name])
    for path in paths:
        with safe_open(path, "pt") as found:
            for name in found.keys():  # noqa: SIM118
                assert torch.equal(found.get_tensor(name), tensors[name])


def test_a_tensor_larger_than_a_file_has_one_of_its_own(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(16), "b": torch.zeros(64), "c": torch.zeros(16)}, tmp_path / "a.safetensors")
    table = Table.of_files([tmp_path / "a.safetensors"])
    assert [[t.name for t in file] for file in shards(table.values(), 100)] == [["a"], ["b"], ["c"]]
    assert shards([]) == []
