from __future__ import annotations

import gzip
import json

import pytest

from moesaic.core.documents import Document, read_documents
from moesaic.core.errors import BadInput


def test_reads_text_and_json_lines_plain_and_gzip(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "x", "domain": "d"}) + "\n\n" + json.dumps({"text": "y"}) + "\n")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as stream:
        stream.write(json.dumps({"text": "ü𝄞"}))
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    assert list(read_documents(tmp_path)) == [
        Document("one\ntwo", "a"), Document("x", "d"), Document("y", "b"), Document("ü𝄞", "c"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": 3}', 'a.jsonl:1: a row must be an object with a string "text"'),
        ("a.jsonl", b'{"text": "x"}\n{oops', "a.jsonl:2: not a JSON line"),
        ("a.txt", b"\xff\xfe\xfa", "a.txt: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}' * 50, mtime=0)[:-12], "a.jsonl.gz: broken gzip"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz: broken gzip"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        list(read_documents(tmp_path))


def test_missing_and_empty(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        list(read_documents(tmp_path / "gone"))
    with pytest.raises(BadInput, match="no data in"):
        list(read_documents(tmp_path))
