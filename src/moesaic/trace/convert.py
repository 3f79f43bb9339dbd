"""Traces to and from NumPy archives and Parquet tables."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.core.files import replacing
from moesaic.trace.file import KEY, VERSION, Header, Trace, from_arrays

ROWS_AT_ONCE = 1 << 16


def to_npz(trace: Trace, path: str | Path) -> None:
    """A NumPy archive with the trace's columns under their own names and its header as JSON text."""
    with replacing(path, ".npz") as scratch:
        np.savez(scratch, header=np.array(trace.header.metadata()[KEY]), **trace.columns)  # type: ignore[arg-type]


def from_npz(path: str | Path) -> Trace:
    """The trace in a NumPy archive: one that `to_npz` wrote, or one with `experts` [T, L, K] and, where known, `weights`,
    `tokens`, `logits`, `lengths` (rows per sequence) and `num_experts`. Nothing is unpickled. Raises BadInput."""
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BadInput(f"cannot read {path} as a NumPy archive: {error}") from error
    if "header" in arrays:
        return Trace(Header.parse({KEY: str(arrays.pop("header"))}, str(path)), arrays).check()
    if "experts" not in arrays:
        raise BadInput(f"{path} has no array `experts` [tokens, layers, slots]; it has {', '.join(arrays) or 'nothing'}")
    experts = arrays["experts"]
    count = int(arrays["num_experts"]) if "num_experts" in arrays else int(experts.max(initial=0)) + 1
    return from_arrays(
        experts,
        count,
        lengths=arrays.get("lengths"),
        weights_TLK=arrays.get("weights"),
        tokens_T=arrays.get("tokens"),
        logits_TLE=arrays.get("logits"),
    )


def to_parquet(trace: Trace, path: str | Path) -> None:
    """A table with a row per token and layer: sequence, position, step, domain, token, layer, experts, weights."""
    arrow, parquet = _arrow()
    layers, slots = len(trace.layers), trace.top_k
    fields = [("sequence", arrow.int32()), ("position", arrow.int32()), ("step", arrow.int64()), ("domain", arrow.string())]
    fields += [("token", arrow.int64()), ("layer", arrow.int16()), ("experts", arrow.list_(arrow.int16()))]
    if trace.weights_TLK is not None:
        fields.append(("weights", arrow.list_(arrow.float32())))
    header = json.dumps({"version": VERSION, **asdict(trace.header)})
    schema = arrow.schema(fields, metadata={KEY: header})
    names = np.array([*trace.domains, None], object)[trace.domain_S]
    with replacing(path) as scratch, parquet.ParquetWriter(scratch, schema) as writer:
        for start in range(0, len(trace), max(1, ROWS_AT_ONCE // layers)):
            rows = slice(start, min(len(trace), start + max(1, ROWS_AT_ONCE // layers)))
            writer.write_table(_table(arrow, trace, rows, names, slots, schema))


def _table(arrow: Any, trace: Trace, rows: slice, names: np.ndarray, slots: int, schema: Any) -> Any:
    layers = len(trace.layers)
    ids_TLK = np.asarray(trace.experts_TLK[rows])
    filled_TLK = ids_TLK != trace.empty
    ends = np.concatenate([[0], np.cumsum(filled_TLK.reshape(-1, slots).sum(1))]).astype(np.int32)
    repeated = {
        "sequence": trace.sequence_T[rows],
        "position": trace.position_T[rows].astype(np.int32),
        "step": trace.step_T[rows],
        "domain": names[trace.sequence_T[rows]],
        "token": np.full(len(ids_TLK), -1) if trace.tokens_T is None else np.asarray(trace.tokens_T[rows]).astype(np.int64),
    }
    columns = [arrow.array(np.repeat(column, layers)) for column in repeated.values()]
    columns.append(arrow.array(np.tile(np.arange(layers, dtype=np.int16), len(ids_TLK))))
    columns.append(arrow.ListArray.from_arrays(ends, arrow.array(ids_TLK[filled_TLK].astype(np.int16))))
    if trace.weights_TLK is not None:
        weights = np.asarray(trace.weights_TLK[rows])[filled_TLK].astype(np.float32)
        columns.append(arrow.ListArray.from_arrays(ends, arrow.array(weights)))
    return arrow.Table.from_arrays(columns, schema=schema)


def from_parquet(path: str | Path) -> Trace:
    """The trace in a table that `to_parquet` wrote, or one with its columns sequence, layer and experts, a row per token
    and layer in order. Raises BadInput."""
    arrow, parquet = _arrow()
    try:
        table = parquet.read_table(path)
    except (OSError, arrow.ArrowInvalid) as error:
        raise BadInput(f"cannot read {path} as a Parquet table: {str(error).splitlines()[0]}") from error
    missing = {"sequence", "layer", "experts"} - set(table.column_names)
    if missing:
        raise BadInput(f"{path} has no column {sorted(missing)[0]!r}: a row is a token at a layer, with its list of experts")
    layer = table["layer"].to_numpy()
    layers = int(layer.max()) + 1 if len(layer) else 0
    if not layers or len(layer) % layers or (layer.reshape(-1, layers) != np.arange(layers)).any():
        raise BadInput(f"{path}: the rows are not token by token with all layers of each in order")
    ids_TLK = _padded(table["experts"].combine_chunks(), layers, -1)
    values: dict[str, Any] = {}
    if "weights" in table.column_names:
        values["weights_TLK"] = _padded(table["weights"].combine_chunks(), layers, 0)
    token = table["token"].to_numpy()[::layers] if "token" in table.column_names else np.array([-1])
    if (token >= 0).all():
        values["tokens_T"] = token
    sequence = table["sequence"].to_numpy()[::layers]
    cuts = np.flatnonzero(np.r_[True, sequence[1:] != sequence[:-1]])
    lengths = np.diff(np.r_[cuts, len(sequence)])
    names: list[str] = []
    if "domain" in table.column_names:
        given = [table["domain"][int(i) * layers].as_py() for i in cuts]
        names = list(dict.fromkeys(name for name in given if name is not None))
        values["domain_S"] = [-1 if name is None else names.index(name) for name in given]
    stored = (table.schema.metadata or {}).get(KEY.encode())
    header = None
    if stored is not None:
        header = Header.parse({KEY: stored.decode()}, str(path))
        names = list(header.domains)
        values["domain_S"] = [-1 if name is None else names.index(name) for name in given]
    experts = [x.experts for x in header.layers] if header else int(ids_TLK.max()) + 1
    trace = from_arrays(ids_TLK, experts, lengths=lengths, domains=names, header=header, **values)
    if "step" in table.column_names:
        from moesaic.trace.join import runs_of

        steps = table["step"].to_numpy()[::layers]
        trace = Trace(trace.header, {**trace.columns, "runs": runs_of(trace.sequence_T, steps)})
    return trace


def _padded(lists: Any, layers: int, empty: float) -> np.ndarray:
    """A list column as [T, L, K], short lists filled up."""
    ends = lists.offsets.to_numpy()
    values = lists.values.to_numpy()
    sizes = np.diff(ends)
    width = int(sizes.max(initial=1))
    table = np.full((len(sizes), width), empty, values.dtype)
    table[np.arange(width) < sizes[:, None]] = values[ends[0] : ends[-1]]
    return table.reshape(-1, layers, width)


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BadInput("Parquet needs pyarrow: pip install 'moesaic[parquet]'") from error
    return pyarrow, pyarrow.parquet
