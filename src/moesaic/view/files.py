"""Check a checkpoint folder before a byte of it is loaded: every problem is named by file and tensor."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from moesaic.core.errors import BadInput

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits per element of the safetensors dtypes; an unknown dtype is left to the safetensors library."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dict. Raises BadInput when it is missing or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise BadInput(f"{folder} has no config.json: not a model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise BadInput(f"{path} must hold a JSON object")
    return config


def check_weights(folder: Path, allow_pickle: bool = False) -> list[Path]:
    """The weight files of a folder, each proven whole. Raises BadInput naming the file, and the tensor, that is not."""
    index = folder / INDEX
    if index.is_file():
        return _check_index(index)
    if (folder / SINGLE).is_file():
        check_shard(folder / SINGLE)
        return [folder / SINGLE]
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled and allow_pickle:
        return pickled
    if pickled:
        raise BadInput(
            f"{pickled[0]} is a pickle, which can run code when it is loaded; convert it to safetensors, or pass "
            "allow_pickle=True (--allow-pickle) if you trust it"
        )
    raise BadInput(f"{folder} has no weights: expected {SINGLE} or {INDEX}")


def check_shard(path: Path) -> dict[str, Any]:
    """The header of a safetensors file whose every tensor lies inside the file and has the size its shape asks for."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise BadInput(f"{path} is truncated: {size} bytes, less than a safetensors header; download it again")
        (length,) = struct.unpack("<Q", prefix)
        if length > size - 8:
            raise BadInput(f"{path} is truncated or not safetensors: its header of {length} bytes exceeds the file")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = {name: tuple(entry["data_offsets"]) for name, entry in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is corrupted: its header is not valid ({error}); download it again") from error
    room = size - 8 - length
    for name, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        entry = tensors[name]
        bits = _BITS.get(entry.get("dtype", ""))
        if bits is not None and (end - start) * 8 != math.prod(entry["shape"]) * bits:
            raise BadInput(f"{path} is corrupted: tensor {name} has {end - start} bytes for {entry['dtype']} {entry['shape']}")
        if end > room:
            raise BadInput(f"{path} is truncated: tensor {name} ends at byte {end} of {room}; download it again")
    return tensors


def _check_index(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{index} is not a safetensors index ({error!r})") from error
    paths = []
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise BadInput(f"{index} names the weights {shard!r}, which is no file of this folder")
        path = index.parent / shard
        names = [name for name, file in weight_map.items() if file == shard]
        if not path.is_file():
            raise BadInput(f"{path} is missing: {index.name} expects {len(names)} tensors in it, first {names[0]}")
        held = check_shard(path)
        for name in names:
            if name not in held:
                raise BadInput(f"{path} has no tensor {name}, which {index.name} expects there")
        paths.append(path)
    return paths
