"""Read documents: plain text, or JSON lines of {text, domain}, plain or gzip, one file or a folder of them."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from moesaic.core.errors import BadInput

SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".txt.gz", ".md.gz", ".jsonl.gz", ".json.gz")


class Document(NamedTuple):
    text: str
    domain: str


def data_files(path: str | Path) -> list[Path]:
    """Files that `read_documents` would read under `path`, sorted by name.

    Raises BadInput when the path is missing or holds no readable file.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise BadInput(f"no such file or folder: {path}")
    files = sorted(p for p in path.iterdir() if p.is_file() and p.name.endswith(SUFFIXES))
    if not files:
        raise BadInput(f"no data in {path}: expected files ending in {', '.join(SUFFIXES)}")
    return files


def read_documents(path: str | Path) -> Iterator[Document]:
    """Yield every document under `path` in file order; a file's stem is the domain where a row names none.

    Raises BadInput naming file and line for broken JSON, a missing `text`, a bad gzip stream or bad UTF-8.
    """
    for file in data_files(path):
        yield from _read_file(file)


def _read_file(file: Path) -> Iterator[Document]:
    name = file.name.removesuffix(".gz")
    stem, kind = name.rsplit(".", 1) if "." in name else (name, "txt")
    opener = gzip.open if file.name.endswith(".gz") else open
    try:
        with opener(file, "rt", encoding="utf-8") as stream:
            if not kind.startswith("json"):
                yield Document(stream.read(), stem)
                return
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield _parse(line, file, number, stem)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(f"{file}: broken gzip stream ({error}); download or compress it again") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _parse(line: str, file: Path, number: int, stem: str) -> Document:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"{file}:{number}: not a JSON line ({error.msg})") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise BadInput(f'{file}:{number}: a row must be an object with a string "text"')
    return Document(row["text"], str(row.get("domain") or stem))


def select(documents: Iterable[Document], max_bytes: int | None, seed: int | None = None) -> list[Document]:
    """The documents to score: all, or the first of each domain up to `max_bytes` (the last one is cut at a character).

    With a seed they are shuffled first, so that a cap draws a sample instead of the head of each file.
    """
    found = list(documents)
    if seed is not None:
        random.Random(seed).shuffle(found)
    if max_bytes is None:
        return found
    left: dict[str, int] = {}
    kept = []
    for document in found:
        room = left.setdefault(document.domain, max_bytes)
        if room <= 0:
            continue
        data = utf8(document)[:room]
        left[document.domain] = room - len(data)
        kept.append(Document(data.decode(errors="ignore"), document.domain))
    return kept


def utf8(document: Document) -> bytes:
    try:
        return document.text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"a document of domain {document.domain!r} holds a lone surrogate (character {error.start}): not valid Unicode text"
        ) from error
