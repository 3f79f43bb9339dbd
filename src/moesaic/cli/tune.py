"""`--tune`: record this text on the streamed model, replay it over what could serve it, print that, and choose."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from moesaic.cli.common import progress_console
from moesaic.cli.loading import open_streamed
from moesaic.core.sizes import show_bytes


def tuned(
    model: str,
    dtype: str,
    streams: dict[str, Any],
    out: Console,
    prompt: str | None = None,
    data: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How to stream this text, as arguments of `open_streamed`, and what was found. A text given with --data goes before a
    prompt."""
    from moesaic.core.documents import read_documents
    from moesaic.serving.generate import encode
    from moesaic.serving.streamed.tune import tune
    from moesaic.trace.replay import history_of

    documents = None if data is None else list(read_documents(data))
    plain = {**streams, "policy": "lru", "lossy": None}
    opened, streamed = open_streamed(model, dtype, trust_remote_code=trust_remote_code, **plain)
    with streamed, progress_console.status("tuning") as status:
        ids = None if prompt is None or documents is not None else encode(opened.tokenizer, prompt)
        found = tune(streamed, ids, documents, _machine(), lambda what: status.update(f"tuning: {what}"))
        plan, total = streamed.engine.plan, streamed.engine.shape.total_bytes
    _show(found, plan.capacity_bytes, total, out)
    chosen = found.chosen
    history, _ = history_of(found.trace, 1.0)
    how = {**streams, "policy": chosen["policy"], "history": history, "hardware": found.hardware}
    if chosen["cache_bytes"] < plan.capacity_bytes:
        how |= {"resident": None, "memory": chosen["cache_bytes"] + plan.budget_bytes - plan.capacity_bytes}
    return how, found.row()


def _machine() -> Any:
    """The machine's profile as `moesaic bench machine` kept it, else measured now, in seconds; its link is measured apart."""
    from moesaic.core import profiles
    from moesaic.trace.hardware import Hardware

    path = profiles.newest()
    if path is not None:
        return Hardware.of_profile(profiles.read(path), str(path))
    from moesaic.bench import machine

    profile = machine.measure(quick=True, disk_folder=Path(tempfile.gettempdir()))
    return Hardware.of_profile({"machine": {}, "disk_bytes_per_second": 1e9, **profile}, "measured now")


def _show(found: Any, capacity: int, total: int, out: Console) -> None:
    machine = found.hardware
    out.print(
        f"\ntuning on {len(found.trace):,} tokens; experts come at {machine.link_bytes_per_second / 1e9:,.2f} GB/s "
        f"(timed on this checkpoint); {machine.name}"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("cache, policy", "hit %", "read/tok", "stall/tok", "tok/s", "at most"):
        table.add_column(name, justify="left" if name.startswith("cache") else "right", no_wrap=True)
    last = None
    for row in found.rows:
        if row["cache_bytes"] != last:
            last = row["cache_bytes"]
            share = next(s for s, b in found.belady.items() if b["cache_bytes"] == last)
            table.add_section()
            table.add_row(f"[bold]{row['cache_share']:.0%}, {show_bytes(last)}[/bold]")
            table.add_row("  belady (the bound)", *_cells(found.belady[share]), style="dim")
        if row["reason"] is None:
            mark = "* " if row is found.chosen else "  "
            table.add_row(f"{mark}{row['policy']}", *_cells(row))
    out.print(table)
    for reason in dict.fromkeys(row["reason"] for row in found.rows if row["reason"]):
        out.print(f"[dim]{reason}[/dim]")
    out.print(f"[bold]{found.why}[/bold]")
    bound = found.belady[max(found.belady)]
    out.print(
        f"no policy gets above {bound['tokens_per_second']:,.1f} tokens/s here (Belady hits {bound['hit_rate']:.1%}): past "
        "that, more memory or smaller experts"
    )
    out.print("[dim]at most: link / (miss rate x experts per token x layers x bytes), however well reads overlap[/dim]")


def _cells(row: dict[str, Any]) -> list[str]:
    bound = row["bound_tokens_per_second"]
    return [
        f"{100 * row['hit_rate']:.1f}",
        show_bytes(row["moved_bytes_per_token"]),
        f"{1000 * row['stall_seconds_per_token']:,.2f} ms",
        f"{row['tokens_per_second']:,.1f}",
        "" if bound is None else f"{bound:,.1f}",
    ]
