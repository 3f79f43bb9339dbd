"""Training curves as one SVG: loss and validation loss above, load balance below, one colour per run.

python -m moesaic.report.curves runs/bundled runs/dense-twin --out docs/curves.svg
"""

from __future__ import annotations

import argparse
import html
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from moesaic.core.errors import BadInput, MoesaicError
from moesaic.core.files import write_atomically

WIDTH, LEFT, RIGHT, TOP = 900, 62, 150, 46
HEIGHTS, GAP = (300, 170), 64
COLOURS = ("#0b6e75", "#c2571a", "#6b4fbb", "#3d7a2e", "#a8325e", "#5f6670")


@dataclass
class Run:
    """One log: (step, value) pairs."""

    name: str
    loss: list[tuple[int, float]]
    valid: list[tuple[int, float]]
    load: list[tuple[int, float]]
    """The busiest expert's load over the mean, averaged over layers; empty for a dense model."""


def read_run(path: str | Path) -> Run:
    """A run folder, or its log.jsonl. Raises BadInput naming what is missing or broken; a line cut short is skipped."""
    path = Path(path)
    log = path / "log.jsonl" if path.is_dir() else path
    if not log.is_file():
        raise BadInput(f"no training log at {log}")
    run = Run(log.parent.name or log.stem, [], [], [])
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            step = int(record["step"]) + 1
            run.loss.append((step, float(record["loss"])))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            continue
        if record.get("valid_loss") is not None:
            run.valid.append((step, float(record["valid_loss"])))
        if record.get("max_vio"):
            run.load.append((step, 1 + sum(record["max_vio"]) / len(record["max_vio"])))
    if not run.loss:
        raise BadInput(f"{log} holds no training records")
    return run


def smooth(points: list[tuple[int, float]], weight: float = 0.85) -> list[tuple[int, float]]:
    """Exponential moving average without the bias of its start: at each point a weighted mean of what came so far."""
    total, mass, smoothed = 0.0, 0.0, []
    for step, value in points:
        total, mass = weight * total + value, weight * mass + 1
        smoothed.append((step, total / mass))
    return smoothed


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high], about that many."""
    if high <= low:
        return [low]
    raw = (high - low) / about
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


class Panel:
    """One pair of axes; `y` maps values to pixels downwards."""

    def __init__(self, title: str, top: float, height: float, steps: int, low: float, high: float) -> None:
        self.title, self.top, self.height, self.steps = title, top, height, steps
        room = 0.04 * (high - low or 1)
        self.low, self.high = low - room, high + room

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / self.steps

    def y(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        return self.top + self.height * (self.high - inside) / (self.high - self.low)

    def frame(self) -> list[str]:
        parts = [f'<text class="h" x="{LEFT}" y="{self.top - 12}">{html.escape(self.title)}</text>']
        for value in ticks(self.low, self.high):
            y = self.y(value)
            parts.append(f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="e" x="{LEFT - 8}" y="{y + 4:.1f}">{value:g}</text>')
        bottom = self.top + self.height
        for value in ticks(0, self.steps, 7):
            parts.append(f'<text class="m" x="{self.x(value):.1f}" y="{bottom + 18:.1f}">{value:,.0f}</text>')
        parts.append(f'<line class="a" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
        return parts

    def line(self, points: list[tuple[int, float]], colour: str, style: str = "") -> str:
        path = " ".join(f"{self.x(s):.1f},{self.y(v):.1f}" for s, v in points)
        return f'<polyline points="{path}" stroke="{colour}" {style}/>'

    def dots(self, points: list[tuple[int, float]], colour: str) -> list[str]:
        return [f'<circle cx="{self.x(s):.1f}" cy="{self.y(v):.1f}" r="3.2" fill="{colour}"/>' for s, v in points]


def svg(runs: list[Run]) -> str:
    """The picture. The loss axis starts where the curves have left their steep start, so that their ends can be told apart."""
    steps = max(run.loss[-1][0] for run in runs)
    ends = [value for run in runs for _, value in [*smooth(run.loss)[len(run.loss) // 12 :], *run.valid[1:]]]
    shown = [value for value in ends if math.isfinite(value)] or [0.0, 1.0]
    loss = Panel(
        "loss, nats per token (line: training, smoothed; dots: validation)", TOP, HEIGHTS[0], steps, min(shown), max(shown)
    )
    parts = loss.frame()
    labels: list[tuple[float, str, str]] = []
    for run, colour in zip(runs, _cycle(), strict=False):
        parts.append(loss.line(run.loss, colour, 'opacity=".18"'))
        parts.append(loss.line(smooth(run.loss), colour))
        if run.valid:
            parts.append(loss.line(run.valid, colour, 'stroke-dasharray="2 4"'))
            parts.extend(loss.dots(run.valid, colour))
        final = (run.valid or smooth(run.loss))[-1][1]
        labels.append((loss.y(final), f"{run.name}  {final:.3f}", colour))
    parts.extend(_labels(labels))
    bottom = TOP + HEIGHTS[0]
    routed = [(run, colour) for run, colour in zip(runs, _cycle(), strict=False) if run.load]
    if routed:
        top = bottom + GAP
        most = max(v for run, _ in routed for _, v in run.load[len(run.load) // 12 :])
        load = Panel(
            "load of the busiest expert over the mean, averaged over layers (1 is even)", top, HEIGHTS[1], steps, 1, most
        )
        parts.extend(load.frame())
        names = []
        for run, colour in routed:
            parts.append(load.line(run.load, colour, 'opacity=".18"'))
            parts.append(load.line(smooth(run.load), colour))
            names.append((load.y(smooth(run.load)[-1][1]), f"{run.name}  {smooth(run.load)[-1][1]:.2f}", colour))
        parts.extend(_labels(names))
        bottom = top + HEIGHTS[1]
    parts.append(f'<text class="m" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{bottom + 40}">optimiser steps</text>')
    style = (
        "text{font:12px system-ui,sans-serif;fill:#3b4148}.h{font-weight:600;font-size:13px}"
        ".e{text-anchor:end}.m{text-anchor:middle}"
        ".g{stroke:#e4e2dc}.a{stroke:#8a9098}polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 56}" width="{WIDTH}" role="img">'
    title = f"<title>Training curves: {html.escape(', '.join(run.name for run in runs))}</title>"
    return "\n".join(
        [head, title, f"<style>{style}</style>", '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>\n"]
    )


def _cycle() -> list[str]:
    return list(COLOURS) * 8


def _labels(wanted: list[tuple[float, str, str]], room: float = 16) -> list[str]:
    """Names at the right end of their curves, moved apart where they would touch."""
    parts, last = [], -math.inf
    for y, text, colour in sorted(wanted):
        last = max(y, last + room)
        escaped = html.escape(text)
        parts.append(
            f'<text x="{WIDTH - RIGHT + 10}" y="{last + 4:.1f}" style="fill:{colour};font-weight:600">{escaped}</text>'
        )
    return parts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moesaic.report.curves", description=__doc__)
    parser.add_argument("runs", nargs="+", help="run folders, or their log.jsonl files")
    parser.add_argument("--out", default="curves.svg", help="where the SVG goes")
    given = parser.parse_args(argv)
    try:
        print(write_atomically(given.out, svg([read_run(run) for run in given.runs])))
    except MoesaicError as error:
        print(f"curves: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
