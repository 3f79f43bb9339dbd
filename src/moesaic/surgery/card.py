"""What a surgery leaves beside the weights: `surgery.json` for machines (expert maps, scores), a model card for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moesaic import __version__
from moesaic.core.errors import BadInput
from moesaic.core.files import write_atomically
from moesaic.core.sizes import show_bytes

NOTES = "surgery.json"


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The steps that made a model folder, oldest first. Raises BadInput for a broken file."""
    path = folder / NOTES
    if not path.is_file():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["steps"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is broken ({error!r}): delete it, or restore it") from error


def write_notes(folder: Path, source: str, steps: list[dict[str, Any]]) -> None:
    """`surgery.json` and README.md of a result."""
    write_atomically(folder / NOTES, json.dumps({"moesaic": __version__, "source": source, "steps": steps}, indent=1))
    write_atomically(folder / "README.md", card(folder.name.removesuffix(".partial"), source, steps))


def card(name: str, source: str, steps: list[dict[str, Any]]) -> str:
    """The model card."""
    lines = [f"# {name}", "", f"Made from `{source}` by moesaic {__version__}:", ""]
    lines += ["| step | options | size | loads with |", "|---|---|---|---|"]
    for step in steps:
        options = ", ".join(f"{key}={value}" for key, value in step["options"].items()) or "defaults"
        loads = "transformers" if step.get("stock", True) else "transformers after `import moesaic`"
        size = show_bytes(step["bytes_after"]) if "bytes_after" in step else ""
        lines.append(f"| {step['family']} {step['method']} | {options} | {size} | {loads} |")
    texts = [text for step in steps for text in (step.get("calibration") or {}).get("text", [])]
    if texts:
        lines += ["", f"Calibrated on {', '.join(dict.fromkeys(texts))}."]
    lines += [
        "",
        "The result is lossy: measure it on your own text with `moesaic eval`. `surgery.json` holds, per block, which expert",
        "became which (`expert_map`, -1: dropped) and the scores that decided.",
    ]
    return "\n".join(lines) + "\n"
