"""Several policies over several cache sizes: one row each, or the reason why a policy cannot be simulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args, get_type_hints

from moesaic.core import registry
from moesaic.core.errors import BadInput
from moesaic.trace.file import Trace
from moesaic.trace.hardware import Hardware
from moesaic.trace.policies.policy import Policy
from moesaic.trace.replay import history_of, replay, shape_of


def build(word: str, family: str = "policies", option: str = "--policy") -> Any:
    """A policy (or another method) of `name` or `name:option=value+option=value`.

    Raises BadInput naming an option that it does not have.
    """
    name, _, options = word.strip().partition(":")
    entry = registry.get(family, name)
    hints = get_type_hints(entry.build.__init__)
    given: dict[str, Any] = {}
    for part in filter(None, options.split("+")):
        key, equals, text = part.partition("=")
        if key not in entry.parameters or not equals:
            raise BadInput(f"{option} {word!r}: {name} has no option {part!r}; it has {', '.join(entry.parameters) or 'none'}")
        given[key] = _value(hints[key], text, f"{option} {word!r}: {part!r}")
    return entry.build(**given)


def _value(kind: Any, text: str, what: str) -> Any:
    choices = get_args(kind)
    if choices:
        if text not in choices:
            raise BadInput(f"{what}: one of {', '.join(choices)}")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise BadInput(f"{what}: true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise BadInput(f"{what}: give a {'whole ' if kind is int else ''}number") from None


def named(policies: str) -> list[tuple[str, Policy]]:
    """The policies of a list separated by commas, or all that are registered."""
    words = [entry.name for entry in registry.entries("policies")] if policies.strip() == "all" else policies.split(",")
    built = [(word.strip(), build(word)) for word in words if word.strip()]
    if not built:
        raise BadInput(f"--policy {policies!r}: name a policy, or all")
    return built


def sweep(
    trace: Trace,
    policies: str,
    capacities: Sequence[int],
    hardware: Hardware,
    *,
    as_decode: bool = False,
    batch: int = 0,
    expert_bytes: int | None = None,
    resident_bytes: int | None = None,
    learn_from: Trace | None = None,
    learn_share: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows of `moesaic replay --json`, by capacity, then by policy. With `all`, what cannot run has a `reason` instead.

    If any policy learns, all replay the same sequences: those not in `learn_share` (default 0.2).
    """
    every, built = policies.strip() == "all", named(policies)
    share = learn_share
    if share is None:
        share = 0.2 if learn_from is None and any(policy.learns for _, policy in built) else 0.0
    try:
        history, sequences = history_of(trace, share, as_decode, learn_from, batch)
    except BadInput:
        if learn_share is not None or not every or learn_from is not None:
            raise
        history, sequences = None, None
    total = shape_of(trace, expert_bytes).total_bytes
    rows: list[dict[str, Any]] = []
    for capacity in capacities:
        for word, policy in built:
            say = None if progress is None else partial(progress, word)
            try:
                result = replay(
                    trace, policy, capacity, hardware, as_decode=as_decode, batch=batch, sequences=sequences, history=history,
                    expert_bytes=expert_bytes, resident_bytes=resident_bytes, progress=say,
                )  # fmt: skip
                rows.append({**result.row(), "policy": word, "reason": None})
            except BadInput as error:
                if not every:
                    raise
                rows.append(_refused(word, policy, capacity, total, str(error)))
    return rows


def _refused(word: str, policy: Policy, capacity: int, total: int, reason: str) -> dict[str, Any]:
    keys = ("hit_rate", "moved_bytes", "stall_seconds", "tokens_per_second")
    row: dict[str, Any] = {
        "policy": word,
        "exact": policy.entry.exact,
        "cache_bytes": capacity,
        "cache_share": capacity / total,
    }
    return {**row, **dict.fromkeys(keys), "notes": [], "reason": reason}
