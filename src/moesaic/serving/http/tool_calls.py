"""Tool calls in an answer, for chat templates whose models write them as `<tool_call>{"name", "arguments"}</tool_call>`.

Answers of models with any other format come back as the text that the model wrote.
"""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

from moesaic.serving.http.stops import overlap

OPEN = "<tool_call>"
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)


class ToolCalls:
    """Splits streamed text into what is said and what is called: from the first tag on, text waits for the end."""

    def __init__(self) -> None:
        self._held = ""
        self._calling = False

    def push(self, text: str) -> str:
        """The part of the text that is certainly no call."""
        self._held += text
        if self._calling:
            return ""
        at = self._held.find(OPEN)
        self._calling = at >= 0
        at = at if self._calling else len(self._held) - overlap(self._held, OPEN)
        out, self._held = self._held[:at], self._held[at:]
        return out

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """Remaining text and the calls; a call that is no valid JSON stays text."""
        held, self._held = self._held, ""
        if not self._calling:
            return held, []
        calls = [_parsed(body) for body in _CALL.findall(held)]
        if not calls or any(call is None for call in calls):
            return held, []
        return _CALL.sub("", held).strip(), [call for call in calls if call is not None]


def _parsed(body: str) -> dict[str, Any] | None:
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call["name"], "arguments": text},
    }
