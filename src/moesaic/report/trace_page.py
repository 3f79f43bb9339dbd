"""The page of `moesaic report`: a routing trace in pictures, one HTML file that needs nothing from outside.

`gather` measures, `html` writes; `trace_page.html` is the template, which draws what it is given. Large tables travel as
bytes in base64: shares as 0 to 255 of the largest one.
"""

from __future__ import annotations

import base64
import html as html_module
import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import numpy as np

from moesaic.trace.file import Trace
from moesaic.trace.statistics.affinity import affinity
from moesaic.trace.statistics.balance import balance
from moesaic.trace.statistics.coactivation import coactivation
from moesaic.trace.statistics.drops import drops
from moesaic.trace.statistics.load import load
from moesaic.trace.statistics.margin import margin
from moesaic.trace.statistics.result import NotRecorded, plain
from moesaic.trace.statistics.reuse import reuse
from moesaic.trace.statistics.sch import sch
from moesaic.trace.statistics.srp import srp

SAMPLE_TOKENS = 160
SAMPLES_PER_DOMAIN = 2
MOST_SAMPLES = 24
WORDS_PER_EXPERT = 14
LARGEST_TABLE = 4_000_000
"""Cells of pairs of experts, over all layers, that the page still draws; beyond, it says so."""

Progress = Callable[[str], None]


def gather(
    trace: Trace,
    texts: Callable[[list[int]], list[str]] | None = None,
    cache_rows: list[dict[str, Any]] | None = None,
    progress: Progress = lambda what: None,
) -> dict[str, Any]:
    """Everything the page shows.

    Args:
        texts: token ids to their texts, None where the tokenizer is not at hand. cache_rows: rows of `replay`'s sweep.
    """
    data: dict[str, Any] = {"layers": [{"name": x.name, "experts": x.experts, "k": x.top_k} for x in trace.layers]}
    data["domains"] = [{"name": name, "tokens": int((trace.domain_T == d).sum())} for d, name in enumerate(trace.domains)]
    progress("load")
    loads = load(trace, resamples=200)
    data["experts"] = int(trace.num_experts)
    data["counts"] = _floats(loads.counts_LE)
    data["domain_counts"] = _floats(loads.counts_DLE)
    shares = balance(trace, resamples=200)
    kinds = ("cv", "gini", "entropy", "max_violation")
    data["balance"] = [
        {kind: plain(getattr(shares, f"{kind}_L")[i]) for kind in kinds}
        | {"dead": int(shares.dead_L[i]), "cv_low": plain(shares.low_LQ[i, 0]), "cv_high": plain(shares.high_LQ[i, 0])}
        for i in range(len(trace.layers))
    ]
    progress("pairs of experts")
    data |= _pairs(trace)
    progress("locality")
    data |= _locality(trace)
    progress("drops and margins")
    found = drops(trace, resamples=0)
    data["drops"] = {"factors": plain(found.factors_F), "position": plain(found.position_FB), "all": plain(found.dropped_F)}
    try:
        margins = margin(trace, resamples=0)
        data["margin"] = {"edges": plain(margins.edges_B1), "hist": plain(margins.margins_LB), "value": plain(margins.value_LQ)}
    except NotRecorded:
        data["margin"] = None
    data["caches"] = [
        {key: row[key] for key in ("policy", "cache_share", "hit_rate", "exact")}
        for row in cache_rows or []
        if row.get("hit_rate") is not None
    ]
    progress("words and texts")
    data["words"] = None if texts is None or trace.tokens_T is None else words(trace, texts)
    data["samples"] = samples(trace, texts)
    data["short"] = in_short(trace, data)
    return data


def _pairs(trace: Trace) -> dict[str, Any]:
    """Co-activation and transitions as bytes, or null where the tables would be too large to look at."""
    layers, experts = len(trace.layers), trace.num_experts
    if layers * experts**2 > LARGEST_TABLE:
        return {"together": None, "flows": None, "too_large": f"{layers} layers of {experts} x {experts} pairs"}
    both = coactivation(trace)
    moved = affinity(trace)
    total_A = np.maximum(moved.transitions_AEE.sum((1, 2)), 1e-30)
    return {
        "together": _bytes(np.nan_to_num(both.conditional_LEE)),
        "together_chance": plain(both.chance_L),
        "flows": _bytes(np.sqrt(moved.transitions_AEE / total_A[:, None, None])),
        "flow_pairs": plain(moved.pair_A2),
        "mutual_bits": plain(moved.mutual_bits_A),
        "null_bits": plain(moved.null_bits_A),
    }


def _locality(trace: Trace) -> dict[str, Any]:
    windows = [w for w in (4, 16, 64, 256) if w <= trace.lengths_S.max(initial=0)] or [1]
    local, hits, used = srp(trace, windows=windows, resamples=200), sch(trace, windows=windows[:2], resamples=0), reuse(trace)
    experts = trace.experts_L.astype(float)
    return {
        "srp": {
            "windows": windows,
            "model": plain(local.model_ZM[0]),
            "low": plain(local.model_low_ZM[0]),
            "high": plain(local.model_high_ZM[0]),
            "null": plain(local.model_null_ZM[0]),
            "even": plain(local.model_even_ZM[0]),
            "layers": plain(local.srp_LM),
        },
        "sch": {"windows": windows[:2], "rho": plain(hits.rho_C), "model": plain(hits.model_ZMC[0])},
        "lru": [plain(used.lru_LE[i, : int(e)]) for i, e in enumerate(experts)],
        "working": {"tokens": plain(used.tokens_N), "layers": plain(used.working_set_LN)},
    }


def words(trace: Trace, texts: Callable[[list[int]], list[str]], more_than: int = 20) -> list[list[list[Any]]]:
    """Per layer and expert, the tokens that are sent to it most beyond their share: [text, share of that token's choices]."""
    tokens_T = np.asarray(trace.tokens_T).astype(np.int64)
    ids, index_T, count_V = np.unique(tokens_T, return_inverse=True, return_counts=True)
    often = np.flatnonzero(count_V > more_than)
    often = often[np.argsort(-count_V[often])][:4096]
    place = np.full(len(ids), -1)
    place[often] = np.arange(len(often))
    row_T = place[index_T]
    known = np.flatnonzero(row_T >= 0)
    names = [texts([number])[0] for number in ids[often].tolist()]
    found = []
    for number, layer in enumerate(trace.layers):
        picked = np.asarray(trace.experts_TLK[known, number]).astype(np.int64)
        cell = np.where(picked < layer.experts, row_T[known, None] * layer.experts + picked, -1)
        table_VE = np.bincount(cell[cell >= 0], minlength=len(often) * layer.experts).reshape(len(often), layer.experts)
        total_V = np.maximum(table_VE.sum(1, keepdims=True), 1)
        usual_E = table_VE.sum(0) / max(table_VE.sum(), 1)
        excess_VE = table_VE - total_V * usual_E
        best = np.argsort(-excess_VE, 0)[:WORDS_PER_EXPERT].T
        rate_VE = table_VE / total_V
        found.append(
            [[[names[v], round(float(rate_VE[v, e]), 3)] for v in best[e] if excess_VE[v, e] > 0] for e in range(layer.experts)]
        )
    return found


def samples(trace: Trace, texts: Callable[[list[int]], list[str]] | None) -> list[dict[str, Any]]:
    """The first tokens of some sequences of every domain, with their choices at all layers."""
    found = []
    for domain in range(-1, len(trace.domains)):
        where = np.flatnonzero((trace.domain_S == domain) & (trace.stream_S == 0) & (trace.lengths_S > 1))
        longest = where[np.argsort(-np.minimum(trace.lengths_S[where], SAMPLE_TOKENS), kind="stable")][:SAMPLES_PER_DOMAIN]
        for sequence in longest.tolist():
            start = int(trace.starts_S1[sequence])
            rows = slice(start, start + min(SAMPLE_TOKENS, int(trace.lengths_S[sequence])))
            numbers = [] if trace.tokens_T is None else np.asarray(trace.tokens_T[rows]).astype(int).tolist()
            shown = texts(numbers) if texts is not None and numbers else [f"{n} " for n in numbers or range(rows.stop - start)]
            ids = np.asarray(trace.experts_TLK[rows]).astype(np.int64)
            ids = np.where(ids == trace.empty, -1, ids)
            weights = None if trace.weights_TLK is None else np.asarray(trace.weights_TLK[rows], np.float32)
            found.append(
                {
                    "domain": trace.domains[domain] if domain >= 0 else "text",
                    "tokens": shown,
                    "ids": base64.b64encode(ids.astype("<i2").tobytes()).decode(),
                    "weights": None if weights is None else _bytes(np.nan_to_num(weights)),
                }
            )
    return found[:MOST_SAMPLES]


def in_short(trace: Trace, data: dict[str, Any]) -> list[str]:
    """The trace in a few sentences."""
    rows, windows = data["balance"], data["srp"]["windows"]
    cv = [row["cv"] or 0.0 for row in rows]
    worst, best = int(np.argmax(cv)), int(np.argmin(cv))
    dead = sum(row["dead"] for row in rows)
    told = [
        f"Load: layer {best} shares its work most evenly (CV {cv[best]:.2f}), layer {worst} least (CV {cv[worst]:.2f}; its "
        f"busiest expert gets {1 + rows[worst]['max_violation']:.1f} times an even share). "
        + (f"{dead} experts were never chosen." if dead else "Every expert was chosen.")
    ]
    at = windows.index(16) if 16 in windows else 0
    if data["srp"]["model"][at] is not None:
        told.append(
            f"Locality: over {windows[at]} tokens one fixed set of experts describes the routing with F1 "
            f"{data['srp']['model'][at]:.2f}; random routing gives {data['srp']['null'][at]:.2f}, random routing with these "
            f"loads {data['srp']['even'][at]:.2f}."
        )
    half = [curve[max(0, len(curve) // 2 - 1)] for curve in data["lru"]]
    if all(value is not None for value in half):
        told.append(
            f"Caching: with half of each layer's experts in fast memory, plain LRU serves {min(half):.0%} to {max(half):.0%} "
            "of the choices, depending on the layer."
        )
    if data.get("mutual_bits"):
        bits = [a - b for a, b in zip(data["mutual_bits"], data["null_bits"], strict=True)]
        top = int(np.argmax(bits))
        told.append(
            f"Flow: the strongest link is from layer {data['flow_pairs'][top][0]} to {data['flow_pairs'][top][1]}, where an "
            f"expert tells {bits[top]:.2f} bits about the next one."
        )
    return told


def html(data: dict[str, Any], title: str, facts: list[tuple[str, str]], made: str, command: str) -> str:
    """The page. Whatever a text holds, it cannot leave the element that holds the data."""
    held = {**data, "title": title, "facts": facts, "made": made, "command": command}
    encoded = json.dumps(held, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = resources.files("moesaic.report").joinpath("trace_page.html").read_text(encoding="utf-8")
    head, rest = template.split("__TITLE__")
    middle, tail = rest.split("__DATA__")
    return head + html_module.escape(f"moesaic report: {title}") + middle + encoded + tail


def _floats(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(np.nan_to_num(array), "<f4").tobytes()).decode()


def _bytes(array: np.ndarray) -> dict[str, Any]:
    """Values from 0 up as bytes, and the value of 255."""
    most = max(float(np.max(array, initial=0.0)), 1e-12)
    shares = np.rint(np.clip(array, 0, None) / most * 255).astype(np.uint8)
    return {"most": most, "data": base64.b64encode(shares.tobytes()).decode()}
