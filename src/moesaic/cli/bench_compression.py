"""`moesaic bench compression`: all methods at equal shares of expert bytes, as a table, a page of docs and a picture."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Option

from moesaic.cli.bench_common import figures, measured, show_notes, words
from moesaic.cli.bench_models import Out
from moesaic.cli.common import Debug, Json, console
from moesaic.core.errors import BadInput


def compression(
    model: Annotated[str, Option(help="A local folder, or `bundled`.")] = "bundled",
    data: Annotated[str, Option(help="A folder with train and valid, documents by domain.")] = "../shared/data/corpus",
    shares: Annotated[str, Option(help="Of expert bytes that stay, by commas.")] = "0.75,0.5,0.25",
    methods: Annotated[str, Option(help="Such as `prune reap,merge hc_smoe`; default: all.")] = "",
    domain: Annotated[str | None, Option(help="Calibrate on this domain and score it alone.")] = None,
    calibrate_bytes: Annotated[int, Option(help="Of each domain.")] = 20_000,
    score_bytes: Annotated[int, Option(help="Of each domain; four times as many within one.")] = 1500,
    context: Annotated[int, Option(help="Tokens per piece of text.")] = 512,
    folder: Annotated[Path | None, Option(help="Statistics and finished rows are kept here, and used again.")] = None,
    threads: Annotated[int, Option(help="CPU threads.")] = 1,
    out: Out = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Every registered pruner, merger, compressor and quantiser at 75, 50 and 25 % of expert bytes."""
    import torch

    from moesaic.bench import compression as bench
    from moesaic.cli.loading import quiet_transformers

    quiet_transformers()
    torch.set_num_threads(threads)
    try:
        parts = tuple(float(word) for word in words(shares))
    except ValueError:
        raise BadInput(f"--shares {shares!r}: numbers by commas") from None
    if not parts or not all(0 < part <= 1 for part in parts):
        raise BadInput(f"--shares {shares!r}: above 0 and at most 1")
    options = bench.Options(
        folder, model, data, parts, words(methods), domain, calibrate_bytes, score_bytes, context
    )  # fmt: skip
    result = measured("compression", partial(bench.run, options), out, json)
    if result is None:
        return
    table = figures("", "share", "bits/byte", "MB experts", "tok/s", "s", "stock")
    for row in result["rows"]:
        said = ", ".join(f"{key}={value}" for key, value in row["options"].items() if key not in ("keep", "bits", "drop"))
        table.add_row(
            f"{row['family']} {row['method']}{f' ({said})' if said else ''}", f"{row['share']:.0%}",
            f"{row['bits_per_byte']:.4f}", f"{row['expert_bytes'] / 1e6:,.2f}", f"{row['tokens_per_second']:,.0f}",
            f"{row['seconds']:,.1f}", "yes" if row["stock"] else "",
        )  # fmt: skip
    console.print(table)
    show_notes({**result, "notes": result["notes"]})
