"""JSON lines that `moesaic steer` reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesaic.core.errors import BadInput


def texts_of(row: Any, needed: Sequence[str], allowed: Sequence[str] = ()) -> bool:
    """Whether a row is an object with these fields as texts, and with `allowed` ones as texts where it has them."""
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in needed):
        return False
    return all(isinstance(row.get(name, ""), str) for name in allowed)


def json_rows(path: Path, option: str, most: int, forms: dict[str, Any]) -> list[dict[str, Any]]:
    """Up to `most` rows, all of the form of the first. `forms`: how a row is written -> a test of it. Raises BadInput naming
    the line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{option} {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or len(rows) == most:
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(f"{path}:{number}: not a JSON line ({error.msg})") from error
        form = next((form for form, fits in forms.items() if fits(row)), None)
        if form is None:
            raise BadInput(f"{path}:{number}: a row is {' or '.join(forms)}")
        rows.append(row)
        forms = {form: forms[form]}
    if not rows:
        raise BadInput(f"{path}: no rows in it")
    return rows


QUESTION = '{"prompt": text, "answer": text}, with "choices", a list of texts, or without'


def is_question(row: Any) -> bool:
    choices = row.get("choices", []) if isinstance(row, dict) else None
    return texts_of(row, ("prompt", "answer")) and isinstance(choices, list) and all(isinstance(c, str) for c in choices)


def question_ids(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], list[int], list[list[int]]]:
    """Prompt, answer and choices as ids; special tokens stand before the prompt only."""

    def ids(text: str, start: bool = False) -> list[int]:
        return list(tokenizer(text, add_special_tokens=start)["input_ids"])

    return ids(row["prompt"], True), ids(row["answer"]), [ids(choice) for choice in row.get("choices", ())]
