"""The page of a sweep: every cell's curves and one sortable table, in one HTML file that loads nothing from outside."""

from __future__ import annotations

import html
import json
from importlib import resources
from pathlib import Path
from typing import Any

from moesaic.core.files import write_atomically

COLUMNS = (
    ("bits_per_byte", "bits/byte"), ("valid_loss", "valid loss"), ("max_vio", "MaxVio"), ("load_cv", "load CV"),
    ("changed", "changed"), ("experts_per_token", "experts/token"), ("flops_per_token", "FLOPs/token"),
    ("parameters", "parameters"), ("tokens_per_cpu_second", "tokens/s"), ("memory_mb", "memory MB"),
)  # fmt: skip


def sweep_page(title: str, summary: dict[str, Any]) -> str:
    """The page of a summary: `rows` and `cells` as moesaic.laboratory writes them, `missing` cells named."""
    missing = summary.get("missing") or []
    done = sum(cell["status"] == "done" for cell in summary["cells"])
    intro = f"{done} cells." + (f" Not there yet: {', '.join(missing[:20])}" if missing else "")
    more = f" and {len(missing) - 20} more." if len(missing) > 20 else "." if missing else ""
    data = {
        "title": title,
        "intro": intro + more,
        "columns": COLUMNS,
        "rows": summary["rows"],
        "cells": [
            {"name": cell["name"], "group": cell["group"], "seed": cell["seed"], "curve": cell["curve"]}
            for cell in summary["cells"]
            if cell["status"] == "done"
        ],
    }
    # "<" only ever stands inside strings here; escaped, no text can close the script element.
    encoded = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = resources.files("moesaic.report").joinpath("sweep_page.html").read_text(encoding="utf-8")
    head, rest = template.split("__TITLE__")
    middle, tail = rest.split("__DATA__")
    return head + html.escape(title) + middle + encoded + tail


def write_page(path: str | Path, title: str, summary: dict[str, Any]) -> Path:
    """Write the page. Raises BadInput naming the file."""
    return write_atomically(path, sweep_page(title, summary))
