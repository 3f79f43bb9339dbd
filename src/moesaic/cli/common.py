"""What every command shares: one JSON object on standard output, one line per error, exit codes 0, 1 and 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moesaic.core.errors import MoesaicError

console = Console()
progress_console = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def emit(result: dict[str, Any]) -> None:
    """Print the command's one JSON object."""
    print(json.dumps(result, ensure_ascii=False))


def keep(result: dict[str, Any], out: Path | None) -> None:
    """Also write the object to a file, where `--out` names one."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


def facts_grid() -> Table:
    """A table of two columns without lines: names, dim, and what is to be said of them."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    return table


def single(command: Any) -> typer.Typer:
    """A Typer app of one command: `app = single(function)`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    return app


def invoke(app: typer.Typer, argv: list[str]) -> None:
    """Run a command; bad input becomes one line on standard error and exit code 2, or a traceback with --debug."""
    try:
        app(argv[1:], prog_name=f"moesaic {argv[0]}", standalone_mode=True)
    except (MoesaicError, OSError) as error:
        if "--debug" in argv:
            raise
        print(f"moesaic {argv[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"moesaic {argv[0]}: interrupted", file=sys.stderr)
        sys.exit(130)
