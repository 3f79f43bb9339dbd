"""The plots of a theory experiment as one SVG: a panel per plot, linear or log-log axes."""

from __future__ import annotations

import html
import math
from typing import Any

from moesaic.report.curves import COLOURS, ticks

WIDTH, LEFT, RIGHT, TOP, HEIGHT, GAP = 820, 70, 190, 44, 220, 78
LEAST = 1e-12


class _Axis:
    """Values to pixels, linear or logarithmic."""

    def __init__(self, values: list[float], log: bool, start: float, end: float) -> None:
        self.log, self.start, self.end = log, start, end
        scaled = [self._scale(value) for value in values] or [0.0, 1.0]
        self.low, self.high = min(scaled), max(scaled)
        if self.high - self.low < 1e-12:
            self.low, self.high = self.low - 0.5, self.high + 0.5

    def _scale(self, value: float) -> float:
        return math.log10(max(value, LEAST)) if self.log else value

    def at(self, value: float) -> float:
        return self.start + (self.end - self.start) * (self._scale(value) - self.low) / (self.high - self.low)

    def marks(self) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high)
        whole = range(math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9) + 1)
        decades = [10.0**i for i in list(whole)[:: max(1, len(whole) // 6)]]
        return decades if len(decades) > 1 else [10**self.low, 10**self.high]


def svg(name: str, plots: list[dict[str, Any]]) -> str:
    """One picture; see `moesaic.evaluation.theory` for what a plot is."""
    parts: list[str] = []
    for index, plot in enumerate(plots):
        parts.extend(_panel(plot, TOP + index * (HEIGHT + GAP)))
    bottom = TOP + len(plots) * (HEIGHT + GAP)
    style = (
        "text{font:12px system-ui,sans-serif;fill:#3b4148}.h{font-weight:600;font-size:13px}.e{text-anchor:end}"
        ".m{text-anchor:middle}.g{stroke:#e4e2dc}polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom}" width="{WIDTH}" role="img">'
    title = f"<title>{html.escape(name)}</title><style>{style}</style>"
    return "\n".join([head, title, '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>\n"])


def _panel(plot: dict[str, Any], top: float) -> list[str]:
    points = [point for line in plot["lines"].values() for point in line]
    x = _Axis([p[0] for p in points], plot["log"], LEFT, WIDTH - RIGHT)
    y = _Axis([p[1] for p in points], plot["log"], top + HEIGHT, top)
    parts = [f'<text class="h" x="{LEFT}" y="{top - 12}">{html.escape(plot["title"])}</text>']
    for value in y.marks():
        at = y.at(value)
        parts.append(f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="e" x="{LEFT - 8}" y="{at + 4:.1f}">{value:.2g}</text>')
    for value in x.marks():
        parts.append(f'<text class="m" x="{x.at(value):.1f}" y="{top + HEIGHT + 18}">{value:,.0f}</text>')
    parts.append(f'<text class="m" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{top + HEIGHT + 36}">{html.escape(plot["x"])}</text>')
    last = -math.inf
    colours = dict(zip(plot["lines"], list(COLOURS) * 8, strict=False))
    for name, line in sorted(plot["lines"].items(), key=lambda item: y.at(item[1][-1][1])):
        path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in line)
        parts.append(f'<polyline points="{path}" stroke="{colours[name]}"/>')
        last = max(y.at(line[-1][1]), last + 16)
        label = html.escape(name)
        parts.append(f'<text x="{WIDTH - RIGHT + 10}" y="{last + 4:.1f}" style="fill:{colours[name]}">{label}</text>')
    return parts
