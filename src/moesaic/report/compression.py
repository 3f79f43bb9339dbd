"""Results of `moesaic bench compression` as tables and a picture of bits per byte over expert bytes.

python -m moesaic.report.compression RESULT.json ... --picture docs/compression.svg > tables.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from moesaic.core.files import write_atomically
from moesaic.report.theory import svg

LINES = 8
"""Methods that the picture shows by name: the best at the middle share, and chance."""

CHANCE = ("prune", "random")


def label(row: dict[str, Any]) -> str:
    told = ("router", "scope", "store", "base")
    said = [str(value) for key, value in row["options"].items() if key in told and value != "uniform"]
    return f"{row['family']} {row['method']}" + (f" ({', '.join(said)})" if said else "")


def by_method(rows: list[dict[str, Any]]) -> dict[str, dict[float, dict[str, Any]]]:
    """Label -> share -> row, the best at the middle share first."""
    found: dict[str, dict[float, dict[str, Any]]] = {}
    for row in rows:
        if row["method"] != "untouched":
            found.setdefault(label(row), {})[row["share"]] = row
    return dict(sorted(found.items(), key=lambda item: item[1].get(0.5, {}).get("bits_per_byte", 99.0)))


def table(result: dict[str, Any]) -> str:
    """Markdown: bits per byte at each share, seconds, tokens per second, what loads it."""
    whole = next(row for row in result["rows"] if row["method"] == "untouched")
    methods = by_method(result["rows"])
    shares = sorted({share for rows in methods.values() for share in rows}, reverse=True)
    lines = [f"| method | {' | '.join(f'{share:.0%}' for share in shares)} | seconds | tokens/s | stock |"]
    lines += ["|---|" + "---|" * (len(shares) + 3)]
    first = [f"{whole['bits_per_byte']:.4f}", *[""] * (len(shares) - 1)]
    lines.append(f"| untouched | {' | '.join(first)} | | {whole['tokens_per_second']:.0f} | yes |")
    for name, rows in methods.items():
        one = rows.get(0.5) or next(iter(rows.values()))
        cells = [f"{rows[share]['bits_per_byte']:.4f}" if share in rows else "" for share in shares]
        stock = "yes" if all(row["stock"] for row in rows.values()) else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {one['seconds']:.1f} | {one['tokens_per_second']:.0f} | {stock} |")
    return "\n".join(lines)


def picture(results: list[dict[str, Any]]) -> str:
    """A panel per result: bits per byte over the experts' share of bytes; the Pareto front is the lower left."""
    plots = []
    for result in results:
        whole = next(row for row in result["rows"] if row["method"] == "untouched")
        methods = by_method(result["rows"])
        shown = list(methods)[:LINES]
        shown += [name for name, rows in methods.items() if _is(rows, CHANCE) and name not in shown]
        lines = {name: _line(methods[name], whole) for name in shown}
        where = f"of {result['domain']}" if result["domain"] else "of all domains"
        title = f"bits per byte {where}, calibrated on other text of the same"
        plots.append({"title": title, "x": "bytes of experts, % of the model's", "lines": lines, "log": False})
    return svg("compression", plots)


def _line(rows: dict[float, dict[str, Any]], whole: dict[str, Any]) -> list[tuple[float, float]]:
    points = [(100 * row["expert_bytes"] / whole["expert_bytes"], row["bits_per_byte"]) for row in rows.values()]
    return sorted([*points, (100.0, whole["bits_per_byte"])], reverse=True)


def front(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that no other one beats in bytes and bits per byte at once, largest first."""
    rows = sorted(result["rows"], key=lambda row: (row["expert_bytes"], row["bits_per_byte"]))
    kept: list[dict[str, Any]] = []
    for row in rows:
        if not kept or row["bits_per_byte"] < kept[-1]["bits_per_byte"]:
            kept.append(row)
    return kept[::-1]


def _is(rows: dict[float, dict[str, Any]], method: tuple[str, str]) -> bool:
    return any((row["family"], row["method"]) == method for row in rows.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    read = [json.loads(path.read_text()) for path in given.results]
    if given.picture:
        write_atomically(given.picture, picture(read))
    for result in read:
        print(f"\n### {result['domain'] or 'all domains'}\n\n{table(result)}\n")
        for row in front(result):
            print(f"- {row['expert_bytes'] / 1e6:.2f} MB: {label(row)} {row['bits_per_byte']:.4f}")
