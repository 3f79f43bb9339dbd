"""Take traces apart and put them together: some sequences or domains of one, several of the same model as one; save."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.core.files import check_writable, replacing
from moesaic.trace import segments
from moesaic.trace.file import Trace, open_trace
from moesaic.trace.join import BY_ROW


def save(trace: Trace, path: str | Path) -> Trace:
    """Write a trace as one file, whole or not at all; the opened file."""
    path = Path(path).expanduser()
    check_writable(path)
    columns = {name: np.asarray(column) for name, column in trace.columns.items() if name != "written"}
    with replacing(path) as scratch, scratch.open("wb") as stream:
        segments.append(stream, columns, trace.header.metadata())
    return open_trace(path)


def select(trace: Trace, sequences: Iterable[int] | None = None, domains: Sequence[str] | str | None = None) -> Trace:
    """Some sequences by number, in that order, or those of some domains. Raises BadInput for one that is not there."""
    if domains is not None:
        names = [domains] if isinstance(domains, str) else list(domains)
        unknown = [name for name in names if name not in trace.domains]
        if unknown:
            raise BadInput(f"{trace.name} has no domain {unknown[0]!r}: it has {', '.join(trace.domains) or 'none'}")
        wanted = [trace.domains.index(name) for name in names]
        found = np.flatnonzero(np.isin(trace.domain_S, wanted))
        chosen = found if sequences is None else np.array([s for s in sequences if s in set(found.tolist())], np.int64)
    else:
        chosen = np.arange(len(trace.domain_S)) if sequences is None else np.fromiter(sequences, np.int64)
    if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(trace.domain_S):
        raise BadInput(f"{trace.name} has sequences 0 to {len(trace.domain_S) - 1}; asked for {chosen.min()} to {chosen.max()}")
    starts, sizes = trace.starts_S1[chosen], trace.lengths_S[chosen]
    rows = np.arange(sizes.sum()) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    columns = {name: np.asarray(trace.columns[name])[rows] for name in BY_ROW if name in trace.columns}
    first_run = np.searchsorted(trace.runs_N4[:, 0], chosen, "left")
    last_run = np.searchsorted(trace.runs_N4[:, 0], chosen, "right")
    runs = [trace.runs_N4[a:b].copy() for a, b in zip(first_run, last_run, strict=True)]
    for number, part in enumerate(runs):
        part[:, 0] = number
    columns["runs"] = np.concatenate(runs) if runs else np.zeros((0, 4), np.int64)
    columns["sequences"] = np.stack([trace.domain_S[chosen], trace.stream_S[chosen]], 1).astype(np.int32)
    if trace.hidden_rows_H is not None and trace.hidden_HLD is not None:
        place = np.full(len(trace), -1)
        place[rows] = np.arange(len(rows))
        target = place[trace.hidden_rows_H]
        order = np.flatnonzero(target >= 0)
        order = order[np.argsort(target[order], kind="stable")]
        columns["hidden_rows"], columns["hidden"] = target[order], np.asarray(trace.hidden_HLD)[order]
    return Trace(trace.header, columns)


def merge(traces: Sequence[Trace]) -> Trace:
    """Several traces of one model, one after the other; columns that some lack are left out.

    Raises BadInput where their layers or tokenizers differ, naming the traces.
    """
    if not traces:
        raise BadInput("no traces to merge")
    first = traces[0]
    for other in traces[1:]:
        check_same_model(first, other)
    names = list(dict.fromkeys(name for trace in traces for name in trace.domains))
    kept = [n for n in (*BY_ROW, "hidden") if all(n in trace.columns for trace in traces)]
    kept = [n for n in kept if len({trace.columns[n].shape[2:] for trace in traces}) == 1]
    columns: segments.Columns = {}
    for name in kept:
        kind = np.result_type(*(trace.columns[name].dtype for trace in traces))
        columns[name] = np.concatenate([np.asarray(trace.columns[name], kind) for trace in traces])
    runs, sequences, hidden, tokens, steps, count = [], [], [], 0, 0, 0
    for trace in traces:
        part = trace.runs_N4.copy()
        part[:, 0] += count
        part[:, 1] += steps
        runs.append(part)
        renamed = np.array([names.index(d) for d in trace.domains] + [-1])
        sequences.append(np.stack([renamed[trace.domain_S], trace.stream_S], 1))
        if trace.hidden_rows_H is not None:
            hidden.append(np.asarray(trace.hidden_rows_H) + tokens)
        tokens, count = tokens + len(trace), count + len(trace.domain_S)
        steps += int(trace.step_T.max()) + 1 if len(trace) else 0
    columns["runs"], columns["sequences"] = np.concatenate(runs), np.concatenate(sequences).astype(np.int32)
    if "hidden" in columns:
        columns["hidden_rows"] = np.concatenate(hidden)
    sources = ", ".join(dict.fromkeys(trace.header.source for trace in traces if trace.header.source))
    return Trace(replace(first.header, domains=tuple(names), source=sources), columns)


def check_same_model(one: Trace, other: Trace) -> None:
    """Raises BadInput when two traces are not of models with the same layers, experts and vocabulary."""
    mine, theirs = ([(x.name, x.experts) for x in t.layers] for t in (one, other))
    if mine != theirs:
        what = f"{len(mine)} layers, {len(theirs)} layers"
        if len(mine) == len(theirs):
            a, b = next((a, b) for a, b in zip(mine, theirs, strict=True) if a != b)
            what = f"{a[0]} with {a[1]} experts, {b[0]} with {b[1]}"
        raise BadInput(f"{one.name} and {other.name} are traces of different models ({what})")
    if one.header.tokenizer and other.header.tokenizer and one.header.tokenizer != other.header.tokenizer:
        raise BadInput(f"{one.name} and {other.name} were recorded with different tokenizers")
