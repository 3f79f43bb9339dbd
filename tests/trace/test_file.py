"""The file: ordinary safetensors, mapped, readable up to the last flush whatever kills the writer, refused when broken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors import safe_open

from moesaic.core.errors import BadInput
from moesaic.trace import open_trace
from moesaic.trace.edit import save
from moesaic.trace.file import KEY, Header, TraceLayer, from_arrays
from moesaic.trace.join import rows_of, runs_of
from moesaic.trace.writer import Writer


def make(tokens=40, layers=3, slots=2, experts=8, seed=0, **options):
    ids = np.random.default_rng(seed).integers(0, experts, (tokens, layers, slots))
    return from_arrays(ids, experts, **options)


def layers(count=2, experts=8):
    return Header(tuple(TraceLayer(f"l.{i}", experts, 2) for i in range(count)))


def write_steps(writer, steps, sequences=(0, 1), first=0):
    """Decoding: every step one token of every sequence, whose only choice says which it is."""
    if first == 0:
        for number in sequences:
            writer.begin(number, -1, 0)
    for step in range(first, first + steps):
        ids = np.stack([np.full((2, 2), (step + s) % 8, np.uint8) for s in sequences])
        writer.add(np.array(sequences), np.full(len(sequences), step), {"experts": ids, "tokens": np.uint16([step] * len(ids))})


def test_is_ordinary_safetensors(tmp_path):
    trace = save(make(domain_S=[0], domains=["prose"]), tmp_path / "a.moetrace")
    with safe_open(tmp_path / "a.moetrace", "np") as file:
        assert np.array_equal(file.get_tensor("experts"), trace.experts_TLK)
        assert json.loads(file.metadata()[KEY])["domains"] == ["prose"]


def test_columns_are_mapped_not_read(tmp_path):
    trace = save(make(), tmp_path / "a.moetrace")
    assert isinstance(trace.experts_TLK, np.memmap)
    assert not trace.experts_TLK.flags.writeable


@pytest.mark.parametrize("experts", [3, 64, 255, 256, 300])
def test_ids_take_one_byte_up_to_255_experts(experts, tmp_path):
    trace = make(experts=experts)
    assert trace.experts_TLK.dtype == (np.uint8 if experts <= 255 else np.uint16)
    assert np.array_equal(save(trace, tmp_path / "a.moetrace").experts_TLK, trace.experts_TLK)


def test_rows_know_sequence_position_and_step():
    trace = make(10, lengths=[4, 6])
    assert trace.sequence_T.tolist() == [0] * 4 + [1] * 6
    assert trace.position_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert trace.step_T.tolist() == [0] * 4 + [1] * 6
    assert make(10, lengths=[4, 6], decode=True).step_T.tolist() == list(range(10))


def test_empty_slots_are_no_choices():
    ids = np.array([[[0, -1]], [[-1, -1]], [[2, 1]]])
    trace = from_arrays(ids, 3)
    assert trace.choices == 3
    assert trace.empty == 255


def test_runs_are_inverted_by_rows():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sequence = np.sort(rng.integers(0, 4, 30))
        step = np.concatenate([np.sort(rng.integers(0, 9, n)) for n in np.bincount(sequence, minlength=4)])
        back = rows_of(runs_of(sequence, step))
        assert np.array_equal(back[0], sequence)
        assert np.array_equal(back[1], step)


def test_decoding_of_a_batch_takes_a_run_per_sequence(tmp_path):
    writer = Writer(layers(), tmp_path / "a.moetrace")
    write_steps(writer, 50)
    trace = writer.close()
    assert trace.runs_N4.tolist() == [[0, 0, 50, 1], [1, 0, 50, 1]]
    assert trace.experts_TLK[:, 0, 0].tolist() == [(t + s) % 8 for s in (0, 1) for t in range(50)]
    assert trace.in_time()[:4].tolist() == [0, 50, 1, 51]


def test_flushes_join_into_the_same_file(tmp_path):
    once, often = Writer(layers(), tmp_path / "once"), Writer(layers(), tmp_path / "often")
    write_steps(once, 12)
    for step in range(12):
        write_steps(often, 1, first=step)
        often.flush()
    assert len(open_trace(tmp_path / "often")) == 24  # readable while it is written
    one, two = once.close(), often.close()
    assert np.array_equal(one.experts_TLK, two.experts_TLK)
    assert np.array_equal(one.runs_N4, two.runs_N4)
    assert (tmp_path / "once").read_bytes() == (tmp_path / "often").read_bytes()


def test_every_cut_of_an_unfinished_file_reads_or_is_refused(tmp_path):
    path = tmp_path / "a.moetrace"
    writer = Writer(layers(), path)
    sizes = []
    for step in range(3):
        write_steps(writer, 1, first=step)
        writer.flush()
        sizes.append(path.stat().st_size)
    whole = path.read_bytes()
    for cut in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:cut])
        complete = sum(size <= cut for size in sizes)
        if complete == 0:
            with pytest.raises(BadInput, match=r"truncated|empty|no routing trace"):
                open_trace(path)
        else:
            trace = open_trace(path)
            assert len(trace) == 2 * complete
            assert trace.lost_bytes == cut - sizes[complete - 1]


WRITE_FOREVER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_file
from moesaic.trace.writer import Writer
writer = Writer(test_file.layers(), {path!r})
for step in range(100000):
    test_file.write_steps(writer, 1, first=step)
    writer.flush()
    if step == 20:
        print("go", flush=True)
"""


def test_a_killed_writer_leaves_what_it_flushed(tmp_path):
    path = tmp_path / "a.moetrace"
    code = WRITE_FOREVER.format(tests=os.path.dirname(__file__), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"go\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    trace = open_trace(path).check()
    assert len(trace) >= 42
    assert trace.experts_TLK[: len(trace) // 2, 0, 0].tolist() == [t % 8 for t in range(len(trace) // 2)]


def test_a_killed_file_is_resumed(tmp_path):
    whole, path = Writer(layers(), tmp_path / "whole"), tmp_path / "a.moetrace"
    write_steps(whole, 10)
    want = whole.close()
    writer = Writer(layers(), path)
    write_steps(writer, 4)
    writer.flush()
    with path.open("ab") as stream:
        stream.write(b"\x40\x00half a blob")  # and here it is killed
    writer = Writer(layers(), path, resume=True)
    assert writer.tokens == 8
    write_steps(writer, 6, first=4)
    trace = writer.close()
    assert np.array_equal(trace.experts_TLK, want.experts_TLK)
    assert np.array_equal(trace.runs_N4, want.runs_N4)


def test_an_existing_file_is_not_touched(tmp_path):
    path = tmp_path / "a.moetrace"
    save(make(), path)
    before = path.read_bytes()
    with pytest.raises(BadInput, match="exists"):
        Writer(layers(), path)
    with pytest.raises(BadInput, match="another model"):
        Writer(layers(), path, resume=True)
    Writer(layers(), path, overwrite=True).close()  # nothing recorded: nothing replaced
    assert path.read_bytes() == before


def broken(trace, path, change):
    """The file of a trace with its header changed."""
    save(trace, path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    meta = json.loads(header["__metadata__"][KEY])
    change(header, meta)
    if header.get("__metadata__"):
        header["__metadata__"][KEY] = json.dumps(meta)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h, m: m.update(version=99), "format 99.*upgrade"),
        (lambda h, m: h.update(__metadata__={}), "no routing trace"),
        (lambda h, m: m.update(layers=[]), "no layers"),
        (lambda h, m: m.pop("domains"), "broken trace header"),
        (lambda h, m: h.pop("runs"), "no column 'runs'"),
        (lambda h, m: m["layers"].pop(), "do not fit"),
        (lambda h, m: h["experts"].update(shape=[1, 1, 1]), "bytes for shape"),
        (lambda h, m: h["experts"].update(dtype="F99"), "broken description"),
    ],
)
def test_broken_headers_are_named(change, words, tmp_path):
    path = tmp_path / "a.moetrace"
    broken(make(), path, change)
    with pytest.raises(BadInput, match=words) as caught:
        open_trace(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b"hello, this is a text", "no routing trace"), (b"\x08" + b"\0" * 7 + b"not json", "no routing trace")],
)
def test_other_files_are_refused(content, words, tmp_path):
    path = tmp_path / "a.moetrace"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=words):
        open_trace(path)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(BadInput, match="no such trace"):
        open_trace(tmp_path / "none")
    with pytest.raises(BadInput, match="folder"):
        open_trace(tmp_path)


def test_ids_past_the_last_expert_are_found(tmp_path):
    trace = make(experts=8)
    ids = trace.experts_TLK.copy()
    ids[7, 1, 0] = 200
    with pytest.raises(BadInput, match=r"expert 200 at layers\.1, which has 8"):
        type(trace)(trace.header, {**trace.columns, "experts": ids}).check()


def test_an_empty_trace_says_so():
    with pytest.raises(BadInput, match="no tokens"):
        make(0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lengths": [3]}, "add up to 3"),
        ({"tokens_T": [1, 2]}, "tokens has 2 rows"),
        ({"weights_TLK": np.zeros((1, 3, 2))}, "weights"),
    ],
)
def test_arrays_that_do_not_fit(options, words):
    with pytest.raises(BadInput, match=words):
        make(**options)
