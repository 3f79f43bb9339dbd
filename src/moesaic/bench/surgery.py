"""`moesaic bench surgery`: halve a generated checkpoint on disk, ours against the disk's own speed and llm-compressor's REAP.

Three cases, each a process of its own from a cold page cache: pruning by statistics that are there (bytes in and bytes out),
calibration and pruning together, and llm-compressor's `REAPPruningModifier` on the same model and tokens.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.bench.generated import SIZES, generate
from moesaic.bench.machine import describe
from moesaic.bench.memory_limit import MemoryLimit, drop_page_cache
from moesaic.core.documents import read_documents, select
from moesaic.core.errors import BadInput
from moesaic.core.sizes import show_bytes
from moesaic.store import Reader
from moesaic.store.table import Table
from moesaic.surgery.measure import measure
from moesaic.trace.corpus import pieces
from moesaic.view.load import load_tokenizer, resolve_model

PIECE = 64 << 20
CASES = ("prune", "reap")
MOST_OF_MEMORY = 0.75
"""Of the machine's memory that a peer may take: more would take other processes down with it."""


@dataclass
class Options:
    folder: Path
    size: str = "4.2b"
    keep: float = 0.5
    data: str = "../shared/data/corpus/valid"
    max_bytes: int = 2000
    """Of each domain of the text; every contestant calibrates on the same tokens."""
    context: int = 512
    cases: tuple[str, ...] = CASES
    peer_python: str = ""
    """An interpreter with llmcompressor; none: ours alone."""
    threads: int = 2
    rounds: int = 1


PEER = r"""
import json, sys, time
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier

given = json.loads(sys.argv[1])
torch.set_num_threads(given["threads"])
began = time.perf_counter()
rows = json.load(open(given["rows"]))
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
model = AutoModelForCausalLM.from_pretrained(given["model"], dtype="auto")
oneshot(
    model=model, dataset=data, recipe=REAPPruningModifier(sparsity=1 - given["keep"]), max_seq_length=given["context"],
    num_calibration_samples=len(rows), moe_calibrate_all_experts=False, shuffle_calibration_samples=False,
)
model.save_pretrained(given["out"])
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"seconds": time.perf_counter() - began, "peak_bytes": peak}))
"""


def run(options: Options, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Rows of {case, impl, seconds, floor_seconds, peak_bytes, limit_bytes, bytes_read, bytes_written}, and notes."""
    if options.size not in SIZES:
        raise BadInput(f"--size {options.size!r}: one of {', '.join(SIZES)}")
    size, notes, rows = SIZES[options.size], list[str](), list[dict[str, Any]]()
    model = generate(options.folder / options.size, size, progress)
    _lend_tokenizer(model)
    table = Table.of_folder(model)
    bank = 2 * size.experts * size.expert_weights
    limit = 2 * bank + (1 << 30)
    progress("measuring the disk")
    rates = disk_rates(model, options.folder)
    out, statistics = options.folder / "surgery-out", options.folder / f"surgery-statistics-{options.size}"
    tokens = _rows(model, options)
    for number in range(options.rounds):
        for case in options.cases:
            if case == "prune" and not statistics.is_dir():
                progress("calibrating, once, for the case that finds statistics")
                torch.set_num_threads(options.threads)
                measure(model, _documents(options), statistics, ("R0", "R1"), context=options.context, source=options.data)
            for impl in ("moesaic", "llm-compressor"):
                if impl == "llm-compressor" and (case == "prune" or not options.peer_python):
                    continue
                shutil.rmtree(out, ignore_errors=True)
                for left in ("partial", "steps"):
                    shutil.rmtree(out.with_name(f"{out.name}.{left}"), ignore_errors=True)
                drop_page_cache(table.files)
                progress(f"round {number + 1}, {case}, {impl}")
                try:
                    row = (
                        _ours(model, out, case, statistics, options)
                        if impl == "moesaic"
                        else _peer(model, out, tokens, options)
                    )
                except subprocess.CalledProcessError as error:
                    notes.append(f"{impl}, {case}: {_last(error.stderr)}")
                    continue
                written = Table.of_folder(out).nbytes
                read = written if case == "prune" else written + table.nbytes
                rows.append(
                    {
                        "case": case, "impl": impl, "round": number, **row, "bytes_read": read, "bytes_written": written,
                        "floor_seconds": read / rates["read"] + written / rates["write"], "limit_bytes": limit,
                    }
                )  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    if not options.peer_python:
        notes.append("llm-compressor: no interpreter was named (--peer-python)")
    header = describe()
    return {
        "machine": header, "size": options.size, "model_bytes": table.nbytes, "bank_bytes": bank, "disk": rates,
        "tokens": sum(map(len, tokens)), "rows": rows, "notes": notes,
    }  # fmt: skip


def disk_rates(model: Path, folder: Path) -> dict[str, float]:
    """Bytes per second, read past the page cache and written through it, in pieces of 64 MiB over 1 GiB."""
    table = Table.of_folder(model)
    largest = sorted(table.values(), key=lambda tensor: -tensor.nbytes)
    left, began, read = 1 << 30, time.perf_counter(), 0
    with Reader("direct") as reader:
        for tensor in largest:
            for first in range(0, tensor.nbytes, PIECE):
                read += reader.read(tensor.piece(first, min(PIECE, tensor.nbytes - first))).nbytes
            if read >= left:
                break
    reading = read / (time.perf_counter() - began)
    piece, path = os.urandom(PIECE), folder / "surgery-disk"
    began = time.perf_counter()
    with path.open("wb") as stream:
        for _ in range(left // PIECE):
            stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())
    writing = left / (time.perf_counter() - began)
    path.unlink()
    return {"read": reading, "write": writing}


def _ours(model: Path, out: Path, case: str, statistics: Path, options: Options) -> dict[str, Any]:
    text = ["--statistics", str(statistics)] if case == "prune" else [
        "--data", options.data, "--max-bytes", str(options.max_bytes), "--context", str(options.context)
    ]  # fmt: skip
    command = [sys.executable, "-m", "moesaic", "prune", str(model), str(out), "--keep", str(options.keep), *text]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "--threads", str(options.threads), "--json"], capture_output=True, text=True, check=True,
        env=_environment(options),
    )  # fmt: skip
    report = json.loads(done.stdout)
    return {"seconds": time.perf_counter() - began, "peak_bytes": report["peak_bytes"], "stock": report["stock"]}


def _peer(model: Path, out: Path, tokens: list[list[int]], options: Options) -> dict[str, Any]:
    rows = options.folder / "surgery-rows.json"
    rows.write_text(json.dumps(tokens))
    given = {
        "model": str(model), "out": str(out), "rows": str(rows), "keep": options.keep, "context": options.context,
        "threads": options.threads,
    }  # fmt: skip
    command = [options.peer_python, "-c", PEER, json.dumps(given)]
    began = time.perf_counter()
    if MemoryLimit.unavailable():
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment(options))
    else:
        most = int(MOST_OF_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        with MemoryLimit(most) as limit:  # page cache counts, and goes first
            done = subprocess.run(
                limit.prefixed(command), capture_output=True, text=True, check=False, env=_environment(options)
            )  # fmt: skip
        if done.returncode:
            why = f"killed, it wants more than {show_bytes(most)}" if done.returncode in (-9, 137) else done.stderr
            raise subprocess.CalledProcessError(done.returncode, command[:1], stderr=why)
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": time.perf_counter() - began, "stock": True}


def _environment(options: Options) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def _documents(options: Options) -> list[Any]:
    return list(select(list(read_documents(options.data)), options.max_bytes, None))


def _rows(model: Path, options: Options) -> list[list[int]]:
    return [piece.ids for piece in pieces(_documents(options), load_tokenizer(model), options.context)]


def _lend_tokenizer(model: Path) -> None:
    """Generated checkpoints have none, and calibration reads text: that of the bundled model serves."""
    for path in Path(resolve_model("bundled")).glob("tokenizer*"):
        shutil.copyfile(path, model / path.name)


def _last(text: str | None) -> str:
    lines = [line for line in (text or "").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "failed without a word"
