"""What `moesaic analyze` prints for people: one table of layers, one of windows, and a sentence on each number."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def render(trace: Any, found: dict[str, Any], skipped: dict[str, str], seconds: float) -> list[Any]:
    parts: list[Any] = [
        f"[bold]{trace.name}[/bold]: {len(trace):,} tokens, {trace.choices:,} choices, {len(trace.layers)} layers, "
        f"{len(trace.domain_S):,} sequences, measured in {seconds:.1f} s"
    ]
    parts.append(_layers(trace, found))
    for name in ("srp",):
        if name in found:
            parts.append(_windows(found))
    parts += [f"[dim]{name}: skipped, {reason}[/dim]" for name, reason in skipped.items()]
    return parts


def _layers(trace: Any, found: dict[str, Any]) -> Table:
    table = Table("layer", "experts", title="layers")
    rows = [[layer.name, f"{layer.experts}, top-{layer.top_k}"] for layer in trace.layers]
    for name, key, head in (("balance", "cv", "CV"), ("balance", "entropy", "entropy"), ("balance", "dead", "dead")):
        if name in found:
            table.add_column(head, justify="right")
            for row, values in zip(rows, found[name].by_layer(), strict=True):
                row.append(_cell(values[key]))
    for row in rows:
        table.add_row(*row)
    return table


def _windows(found: dict[str, Any]) -> Table:
    table = Table("window", "SRP", "i.i.d.", title="locality")
    for row in found["srp"].summary()["rows"]:
        table.add_row(str(row["window_tokens"]), _cell(row["srp"]), _cell(row["null"]))
    return table


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
