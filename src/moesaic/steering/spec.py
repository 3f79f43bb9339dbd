"""Steering as a user writes it: `name:option=value,option=value` on a command line, a mapping in Python and JSON."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from moesaic.core import registry
from moesaic.core.errors import BadInput
from moesaic.steering.steer import Steer, Steering
from moesaic.view import Policy
from moesaic.view.policy import VALUES, by_layer

Spec = str | Steer | Steering | Mapping[str, Any] | Sequence[Any] | None
FIELDS = tuple(name for name in VALUES if name != "probs")
"""Fields of a policy that a request may give beside methods; probs make sense for single tokens only."""


def steering(spec: Spec, files: Mapping[str, str] | None = None) -> Steering:
    """A Steering from a spec, a method, a list of them, or {"k": 1, "steer": {"mote": {"off": ...}}} with policy fields.

    `files`: the only files that may be named, by the names they go by (a server's); None lets specs name paths.
    Raises BadInput or UnknownMethod naming what is wrong.
    """
    if spec is None:
        return Steering()
    if isinstance(spec, Steering):
        return spec
    if isinstance(spec, Steer):
        return Steering([spec])
    if isinstance(spec, str):
        return Steering([_of_text(spec, files)])
    if isinstance(spec, Mapping):
        fields = {name: by_layer(value) for name, value in spec.items() if name != "steer" and value is not None}
        unknown = [name for name in fields if name not in FIELDS]
        if unknown:
            raise BadInput(f"steer: no field {unknown[0]!r}: one of {', '.join(FIELDS)}, or steer: {{method: options}}")
        methods = spec.get("steer") or {}
        if not isinstance(methods, Mapping):
            raise BadInput('steer: give {"method": {"option": value}}')
        made = [build(name, options or {}, files) for name, options in methods.items()]
        return Steering(made, Policy(**fields) if fields else None)
    parts = [steering(part, files) for part in spec]
    policy = None
    for part in parts:
        if part.policy is not None:
            policy = part.policy if policy is None else policy.both(part.policy)
    return Steering([method for part in parts for method in part.methods], policy)


def build(name: str, options: Mapping[str, Any], files: Mapping[str, str] | None = None) -> Steer:
    """A registered steering method. Raises BadInput naming an option that it does not have, or that is missing."""
    entry = registry.get("steering", name)
    if not isinstance(options, Mapping):
        raise BadInput(f"steer {name}: options are {{name: value}}, given {options!r}")
    given = {key: by_layer(value) for key, value in options.items()}
    for key in given:
        if key not in entry.parameters:
            raise BadInput(f"steer {name}: no option {key!r}; it has {', '.join(entry.parameters) or 'none'}")
    missing = [key for key, p in entry.parameters.items() if p.default is inspect.Parameter.empty and key not in given]
    if missing:
        raise BadInput(f"steer {name}: {missing[0]} is missing")
    kind: Any = entry.build
    if files is not None:
        for key in kind.files & given.keys():
            if not isinstance(given[key], str) or given[key] not in files:
                known = ", ".join(sorted(files)) or "none"
                raise BadInput(f"steer {name}: {key} {given[key]!r} is no file of this server; it has {known}")
            given[key] = files[given[key]]
    try:
        return kind(**given)
    except (TypeError, AttributeError) as error:
        raise BadInput(f"steer {name}: an option of the wrong kind ({error})") from error


def _of_text(text: str, files: Mapping[str, str] | None) -> Steer:
    """`name` or `name:option=value,option=value`; values are numbers, words, or JSON."""
    name, _, rest = text.strip().partition(":")
    options: dict[str, Any] = {}
    for part in _parts(rest):
        key, equals, value = part.partition("=")
        if not equals:
            raise BadInput(f"--steer {text!r}: {part!r} is no option=value")
        options[key.strip()] = _value(value.strip())
    return build(name.strip(), options, files)


def _parts(text: str) -> list[str]:
    """Split at commas that are in no bracket."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    return [part for part in (*parts, current) if part.strip()]


def _value(text: str) -> Any:
    try:
        return json.loads(text) if text[:1] in "[{" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError):
        return text
