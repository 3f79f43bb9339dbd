"""`moesaic serve --models A,B,C --memory 8GiB`: several models behind one address, loaded when a request names them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from moesaic.cli.common import emit, progress_console
from moesaic.core.errors import BadInput
from moesaic.core.sizes import parse_bytes, show_bytes


def named(models: str) -> dict[str, str]:
    """Name -> MODEL of `A,B` or `name=A,B`; a name is else the last part of its path. Raises BadInput."""
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in models.split(","))):
        name, equals, source = part.partition("=")
        source = source if equals else part
        name = name if equals else Path(source).name
        if not name or not source or name in found:
            raise BadInput(f"--models {part!r}: two models of one name, or none: write NAME=FOLDER,NAME=FOLDER")
        found[name] = source
    if len(found) < 2:
        raise BadInput(f"--models {models!r}: give at least two, as FOLDER,FOLDER; for one leave the option out")
    return found


def budget_of(memory: str | None, one: dict[str, bool]) -> int:
    """Bytes for all models. `one`: what only a single model has, and whether it was given. Raises BadInput."""
    for option, given in one.items():
        if given:
            raise BadInput(f"{option} is about one model: leave it out with --models")
    if memory is None:
        raise BadInput("--models shares one budget: give --memory, such as 8GiB")
    return parse_bytes(memory, "--memory")


def serve_models(
    models: dict[str, str],
    budget: int,
    *,
    policy: str,
    pin: list[str],
    max_wait: float,
    bound: Any,
    keys: list[str],
    engine: dict[str, Any],
    load: dict[str, Any],
    threads: int | None,
    max_body: int,
    timeout: float,
    write_timeout: float,
    grace: float,
    access_log: bool,
    json: bool,
) -> None:
    """Serve until a signal. Nothing is loaded before a request asks for it."""
    from moesaic.cli.loading import quiet_transformers
    from moesaic.cli.options import use_threads
    from moesaic.serving.http.server import Server, serve
    from moesaic.serving.models.app import build
    from moesaic.serving.models.checkpoints import as_served
    from moesaic.serving.models.fleet import Fleet

    quiet_transformers()
    use_threads(threads)
    unknown = sorted(set(pin) - models.keys())
    if unknown:
        raise BadInput(f"--pin {unknown[0]}: one of {', '.join(models)}")
    service = {"timeout": timeout, "write_timeout": write_timeout}
    known = [
        as_served(name, source, load=load, engine=engine, service=service, pinned=name in pin)
        for name, source in models.items()
    ]
    fleet = Fleet(known, budget, policy=policy, max_wait=max_wait, timeout=timeout, max_waiting=engine["max_waiting"])
    server = Server(build(fleet, keys=keys, max_body=max_body), fleet, grace=grace, access_log=access_log)
    address, port = bound.getsockname()[:2]
    url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"

    def ready() -> None:
        if json:
            emit({"url": url, "host": address, "port": port, "models": fleet.names, "keys": len(keys), **fleet.facts()})
            sys.stdout.flush()
            return
        out = progress_console
        out.print(f"[bold]{url}[/bold]  the live page; [bold]{url}/v1[/bold] the API", highlight=False)
        for model in known:
            out.print(f"[dim]{model.key}: {show_bytes(model.bytes)}{', pinned' if model.pinned else ''}[/dim]", highlight=False)
        out.print(f"[dim]budget {show_bytes(budget)}, {policy}; a waiting model goes first after {max_wait:g} s[/dim]")
        if not keys and address not in ("127.0.0.1", "::1"):
            out.print("[yellow]no --api-key: everyone who reaches this address can use it[/yellow]")

    serve(server, bound, ready)
