"""`moesaic theory`: claims about routing as experiments of minutes, with what showed and the plots."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moesaic.cli.common import Debug, Json, console, emit, keep, progress_console, single


def theory(
    name: Annotated[str, typer.Argument(help="activation_gate, alf_lb, over_specified, or all.")] = "all",
    out: Annotated[Path | None, typer.Option(help="Folder for NAME.json and NAME.svg.")] = None,
    repetitions: Annotated[
        int | None, typer.Option(min=1, help="Fits per point; the experiment's own number if left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds instead of minutes: shows that it runs, not more.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the theory experiments; each says which claims show, which do not, and which cannot be told at this size."""
    import torch

    from moesaic.core.errors import BadInput
    from moesaic.core.files import write_atomically
    from moesaic.evaluation.theory import EXPERIMENTS
    from moesaic.report.theory import svg

    if name != "all" and name not in EXPERIMENTS:
        raise BadInput(f"no experiment {name!r}: one of {', '.join(EXPERIMENTS)}, all")
    torch.set_num_threads(threads)
    options = {"seed": seed, "quick": quick} | ({} if repetitions is None else {"repetitions": repetitions})
    results = {}
    for each in EXPERIMENTS if name == "all" else [name]:
        start = time.monotonic()
        with progress_console.status(each):
            found = EXPERIMENTS[each](**options)
        found |= {"experiment": each, "seconds": round(time.monotonic() - start, 1), **options}
        results[each] = found
        if out is not None:
            keep(found, out / f"{each}.json")
            write_atomically(out / f"{each}.svg", svg(each, found["plots"]))
        if not json:
            table = Table("claim", "shows", "what was seen", title=f"{each}, {found['seconds']:.0f} s")
            for claim in found["claims"]:
                table.add_row(claim["claim"], claim["shows"], claim["saw"])
            console.print(table)
    if json:
        emit({"experiments": list(results.values())})


app = single(theory)
