"""The registry: one decorator above a function or class makes it a method that tests, CLI, docs and benchmarks find.

File name = registered name = public name: `get("routing", "adamoe")` imports `moesaic.routing.adamoe` and nothing else.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from moesaic.core.errors import UnknownMethod

T = TypeVar("T", bound=Callable[..., Any])

FAMILIES = {
    "routing": "moesaic.routing",
    "experts": "moesaic.experts",
    "balancing": "moesaic.balancing",
    "schedules": "moesaic.schedules",
    "layers": "moesaic.layers",
    "kernels": "moesaic.kernels",
    "policies": "moesaic.trace.policies",
    "lossy": "moesaic.serving.streamed.lossy",
    "statistics": "moesaic.trace.statistics",
    "prune": "moesaic.surgery.prune",
    "merge": "moesaic.surgery.merge",
    "compress": "moesaic.surgery.compress",
    "quantize": "moesaic.surgery.quantize",
    "upcycle": "moesaic.surgery.upcycle",
    "distill": "moesaic.surgery.distill",
    "unlearn": "moesaic.surgery.unlearn",
    "edit": "moesaic.surgery.edit",
    "steering": "moesaic.steering",
    "orchestration": "moesaic.orchestration",
}
"""Family name -> package whose modules may register methods. A new family is one line here."""


@dataclass(frozen=True)
class Entry:
    """One registered method. `facts` holds what only its family asks about (such as a kernel's devices)."""

    family: str
    name: str
    build: Callable[..., Any]
    paper: str | None
    card: str
    exact: bool
    needs: frozenset[str]
    causal: bool
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """First line of the method's file: what it is, in words."""
        return (sys.modules[self.build.__module__].__doc__ or "").strip().split("\n")[0]

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The signature, which is the schema of Python, YAML and CLI alike."""
        return dict(inspect.signature(self.build).parameters)


_entries: dict[tuple[str, str], Entry] = {}


def register(
    family: str,
    name: str,
    *,
    card: str,
    paper: str | None = None,
    exact: bool = True,
    needs: Iterable[str] = (),
    causal: bool = True,
    **facts: Any,
) -> Callable[[T], T]:
    """Register the decorated function or class. Raises ValueError for an unknown family or a name taken twice."""
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: one of {', '.join(FAMILIES)}")

    def add(build: T) -> T:
        held = _entries.get((family, name))
        if held is not None and held.build.__module__ != build.__module__:
            raise ValueError(f"{family} {name!r} is registered by {held.build.__module__} and {build.__module__}")
        _entries[family, name] = Entry(family, name, build, paper, card, exact, frozenset(needs), causal, facts)
        return build

    return add


def get(family: str, name: str) -> Entry:
    """The entry of that name. Raises UnknownMethod listing the names that exist."""
    if family not in FAMILIES:
        raise UnknownMethod(f"unknown family {family!r}: one of {', '.join(FAMILIES)}")
    if (family, name) not in _entries and name.isidentifier():
        module = f"{FAMILIES[family]}.{name}"
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
    if (family, name) not in _entries:
        names = ", ".join(entry.name for entry in entries(family))
        raise UnknownMethod(f"no {family} method {name!r}: one of {names}")
    return _entries[family, name]


def entries(family: str | None = None) -> list[Entry]:
    """Every registered method, or those of one family, by family and name. Imports the packages it lists."""
    for package_name in FAMILIES.values() if family is None else [FAMILIES[family]]:
        package = importlib.import_module(package_name)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package_name}.{module.name}")
    order = list(FAMILIES)
    found = [e for e in _entries.values() if family is None or e.family == family]
    return sorted(found, key=lambda e: (order.index(e.family), e.name))
