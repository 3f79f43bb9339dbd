"""`moesaic analyze COUNTS.npz`: what tables of counts say where nobody kept a trace.

The archive holds `DOMAIN.counts` [L, E], where known `DOMAIN.pairs` [L - 1, E, E] (choices of one listed layer and of the
next), and `layers` [L], their numbers. Load, balance, affinity and how far domains differ can be told from them.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from moesaic.core.errors import BadInput


def read(path: Path) -> tuple[list[int], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Layer numbers, counts and pairs by domain. Raises BadInput for an archive that holds no counts."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BadInput(f"cannot read {path} as a NumPy archive: {error}") from error
    counts = {name.removesuffix(".counts"): array for name, array in arrays.items() if name.endswith(".counts")}
    if not counts:
        raise BadInput(f"{path} has no array DOMAIN.counts [layers, experts]; it has {', '.join(arrays) or 'nothing'}")
    pairs = {name.removesuffix(".pairs"): array for name, array in arrays.items() if name.endswith(".pairs")}
    depth = len(next(iter(counts.values())))
    return [int(n) for n in arrays.get("layers", np.arange(depth))], counts, pairs


def document(path: Path) -> dict[str, Any]:
    """The JSON object: a row per layer, the pairs of layers, and the distance between domains."""
    from moesaic.trace.statistics.affinity import affinity
    from moesaic.trace.statistics.balance import balance
    from moesaic.trace.statistics.load import load
    from moesaic.trace.statistics.result import plain

    numbers, counts, pairs = read(path)
    even, loads = balance(counts), load(counts)
    own = {name: balance(table) for name, table in counts.items()}
    layers = [
        {
            "name": f"layer {number}",
            "load": plain(loads.share_LE[i]),
            "cv": plain(even.cv_L[i]),
            "gini": plain(even.gini_L[i]),
            "entropy": plain(even.entropy_L[i]),
            "max_over_mean": plain(even.max_violation_L[i] + 1),
            "dead": int(even.dead_L[i]),
            "domains": {
                name: {"cv": plain(one.cv_L[i]), "max_over_mean": plain(one.max_violation_L[i] + 1)}
                for name, one in own.items()
            },
        }
        for i, number in enumerate(numbers)
    ]
    names = list(counts)
    moved = {
        f"{a}, {b}": plain(0.5 * np.abs(loads.share_DLE[i] - loads.share_DLE[j]).sum(-1))
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i < j
    }
    links = []
    if pairs:
        found = affinity(pairs)
        for i in range(len(found.mutual_bits_A)):
            links.append(
                {
                    "layers": [numbers[i], numbers[i + 1]],
                    "mutual_bits": plain(found.mutual_bits_A[i]),
                    "null_bits": plain(found.null_bits_A[i]),
                    "likeliest_successor": plain(found.stay_AE[i, 0]),
                    "null_likeliest_successor": plain(found.null_stay_AE[i, 0]),
                }
            )
    total = int(sum(table.sum() for table in counts.values()))
    return {"file": str(path), "choices": total, "layers": layers, "affinity": links, "domain_distance": moved}


def render(found: dict[str, Any]) -> list[Table]:
    """The same for people."""
    table = Table(title=f"{found['file']}: {found['choices']:,} choices")
    names = list(found["layers"][0]["domains"])
    for name in ("layer", "CV", "entropy", "busiest", "dead", *(f"CV {name}" for name in names)):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for row in found["layers"]:
        cells = [f"{row['cv']:.3f}", f"{row['entropy']:.3f}", f"{row['max_over_mean']:.2f}", str(row["dead"])]
        table.add_row(row["name"], *cells, *(f"{row['domains'][name]['cv']:.3f}" for name in names))
    tables = [table]
    if found["affinity"]:
        links = Table(title="what a layer's experts tell about the next listed one's")
        for name in ("layers", "bits", "bits by chance", "likeliest successor", "by chance"):
            links.add_column(name, justify="right")
        for row in found["affinity"]:
            shares = (row["likeliest_successor"], row["null_likeliest_successor"])
            bits = (row["mutual_bits"], row["null_bits"])
            where = " to ".join(map(str, row["layers"]))
            links.add_row(where, *(f"{b:.3f}" for b in bits), *(f"{s:.1%}" for s in shares))
        tables.append(links)
    far = Table(title="share of the choices that go elsewhere in another domain (total variation)")
    far.add_column("domains")
    for row in found["layers"]:
        far.add_column(row["name"], justify="right")
    for name, values in found["domain_distance"].items():
        far.add_row(name, *(f"{value:.1%}" for value in values))
    return [*tables, far]
