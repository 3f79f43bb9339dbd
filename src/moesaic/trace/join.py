"""Put the blobs of a capture together: rows sequence by sequence, in the order in which they were routed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moesaic.trace import segments

BY_ROW = ("experts", "weights", "logits", "ahead", "tokens")


def runs_of(sequence_T: np.ndarray, step_T: np.ndarray) -> np.ndarray:
    """Runs [N, 4] of rows that are sorted by sequence, then by step; see `Trace.runs_N4`."""
    if not len(sequence_T):
        return np.zeros((0, 4), np.int64)
    new = np.flatnonzero(np.r_[True, (np.diff(sequence_T) != 0) | (np.diff(step_T) != 0)])
    count = np.diff(np.r_[new, len(sequence_T)])
    sequence, step = sequence_T[new].astype(np.int64), step_T[new].astype(np.int64)
    starts = np.flatnonzero(np.r_[True, (np.diff(sequence) != 0) | (np.diff(step) != 1) | (np.diff(count) != 0)])
    tokens = np.add.reduceat(count, starts)
    return np.stack([sequence[starts], step[starts], tokens, count[starts]], 1)


def rows_of(runs_N4: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sequence and step of every row: the inverse of `runs_of`."""
    sequence, first, tokens, each = runs_N4.T
    within = np.arange(tokens.sum()) - np.repeat(np.cumsum(tokens) - tokens, tokens)
    return np.repeat(sequence, tokens), np.repeat(first, tokens) + within // np.repeat(np.maximum(each, 1), tokens)


def _plan(parts: list[segments.Columns]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Where each part's rows go, the runs of the whole, and its table of sequences."""
    pairs = [rows_of(np.asarray(part["runs"], np.int64)) for part in parts]
    sequence_T, step_T = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
    order = np.lexsort((step_T, sequence_T))  # stable: rows of one step stay in their order
    target = np.empty_like(order)
    target[order] = np.arange(len(order))
    cuts = np.cumsum([len(pair[0]) for pair in pairs])[:-1]
    table: dict[int, tuple[int, int]] = {}
    for part in parts:
        numbers_S = part.get("written", np.arange(len(part["sequences"])))  # a finished trace that was then gone on with
        for number, (domain, stream) in zip(numbers_S, part["sequences"], strict=True):
            table[int(number)] = (int(domain), int(stream))
    numbers = np.unique(sequence_T)  # sequences of which nothing was kept (all padding) leave no gap
    runs = runs_of(np.searchsorted(numbers, sequence_T[order]), step_T[order])
    sequences = np.array([table.get(int(n), (-1, 0)) for n in numbers], np.int32).reshape(-1, 2)
    return np.split(target, cuts), runs, sequences


def joined(parts: list[segments.Columns]) -> segments.Columns:
    """The columns of all parts in memory, without the bookkeeping of a capture."""
    targets, runs, sequences = _plan(parts)
    columns: segments.Columns = {"runs": runs, "sequences": sequences}
    tokens = int(runs[:, 2].sum())
    for name in BY_ROW:
        if name in parts[0]:
            first = parts[0][name]
            columns[name] = np.empty((tokens, *first.shape[1:]), first.dtype)
            for part, target in zip(parts, targets, strict=True):
                columns[name][target] = part[name]
    if "hidden" in parts[0]:
        rows = [target[np.asarray(part["hidden_rows"])] for part, target in zip(parts, targets, strict=True)]
        order = np.argsort(np.concatenate(rows), kind="stable")
        columns["hidden_rows"] = np.concatenate(rows)[order]
        columns["hidden"] = np.concatenate([part["hidden"] for part in parts])[order]
    return columns


def write_joined(path: Path, parts: list[segments.Columns], metadata: dict[str, str]) -> None:
    """Write the columns of all parts as one blob, column by column through a memory map: no copy of them in memory."""
    targets, runs, sequences = _plan(parts)
    small: segments.Columns = {"runs": runs, "sequences": sequences}
    if "hidden" in parts[0]:
        small |= {name: column for name, column in joined(parts).items() if name.startswith("hidden")}
    tokens = int(runs[:, 2].sum())
    shapes = {name: (array.dtype, array.shape) for name, array in small.items()}
    for name in BY_ROW:
        if name in parts[0]:
            shapes[name] = (parts[0][name].dtype, (tokens, *parts[0][name].shape[1:]))
    head, starts = segments.header(shapes, metadata)
    size = len(head) + sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in shapes.values())
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(size)
    for name, (dtype, shape) in shapes.items():
        if not np.prod(shape):
            continue
        column = np.memmap(path, dtype, "r+", len(head) + starts[name], shape)
        if name in small:
            column[:] = small[name]
        else:
            for part, target in zip(parts, targets, strict=True):
                column[target] = part[name]
        column.flush()
