"""The child's side: load a model, then answer {"do": "prefill" | "decode" | "facts", "ids": [...]} until the input ends.

Nothing but the standard library: a peer's interpreter may have no torch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any


def peak_bytes() -> int:
    """The most memory that this process has had resident."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def answer(load: Callable[[], Any]) -> None:
    """`load()` gives an object with prefill(ids) and step(id), both leaving the last logits in `logits()`, and facts()."""
    out = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints must not stand among the answers
    began = time.perf_counter()
    try:
        model = load()
    except Exception as error:  # the parent shows it
        out.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        out.flush()
        return
    out.write(json.dumps({"seconds": time.perf_counter() - began, "peak_bytes": peak_bytes()}) + "\n")
    out.flush()
    for line in sys.stdin:
        command = json.loads(line)
        reply: dict[str, Any] = {}
        try:
            began = time.perf_counter()
            if command["do"] == "prefill":
                model.prefill(command["ids"])
            elif command["do"] == "decode":
                reply["steps"] = []
                for token in command["ids"]:
                    before = time.perf_counter()
                    model.step(token)
                    reply["steps"].append(time.perf_counter() - before)
            reply["seconds"] = time.perf_counter() - began
            if command["do"] == "facts":
                reply |= model.facts()
                reply["top"] = model.top()
            reply["peak_bytes"] = peak_bytes()
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(reply) + "\n")
        out.flush()
