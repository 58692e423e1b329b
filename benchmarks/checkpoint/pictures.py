"""Line charts as SVG files that stand alone, for the documentation: light and dark, and no library needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH, PANEL, LEFT, RIGHT, TOP, BELOW = 760, 210, 62, 14, 34, 46

FEW = 12
"""A line of fewer points shows them."""

COLOURS = ("#0a7d4f", "#c2410c", "#2563a8", "#8a5a9e", "#7a7a7a")
STYLE = """
svg { font: 13px system-ui, sans-serif; background: #fff; color: #222 }
text { fill: currentColor } .tick { font-size: 11px; opacity: .75 } .name { font-weight: 600 }
.grid { stroke: currentColor; opacity: .15 } .line { fill: none; stroke-width: 2 } .faint { stroke-dasharray: 2 4 }
@media (prefers-color-scheme: dark) { svg { background: #14171a; color: #ddd } }
"""


@dataclass(frozen=True)
class Series:
    """A line. What has one name has one colour in all panels; `faint` lines are dotted, and not in the legend."""

    name: str
    points: Sequence[tuple[float, float]]
    faint: bool = False


@dataclass(frozen=True)
class Panel:
    """One chart: `x` and `y` name the axes; `log` makes both logarithmic."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    log: bool = False


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """Write the panels, one below the other, as one SVG."""
    names = list(dict.fromkeys(series.name for panel in panels for series in panel.series))
    colour_of = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    parts, left = [], LEFT
    for name, colour in colour_of.items():
        parts.append(f'<line x1="{left}" x2="{left + 18}" y1="14" y2="14" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{left + 24}" y="18">{escape(name)}</text>')
        left += 44 + 7 * len(name)
    for number, panel in enumerate(panels):
        offset = 24 + number * (TOP + PANEL + BELOW)
        parts.append(f'<g transform="translate(0 {offset})">{_panel(panel, colour_of)}</g>')
    height = 24 + len(panels) * (TOP + PANEL + BELOW)
    title = escape("; ".join(panel.title for panel in panels))
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"><title>{title}</title>'
        f"<style>{STYLE}</style>{''.join(parts)}</svg>\n",
        encoding="utf-8",
    )


def _panel(panel: Panel, colour_of: dict[str, str]) -> str:
    points = [point for series in panel.series for point in series.points]
    across = _Axis([x for x, _ in points], panel.log, LEFT, WIDTH - RIGHT)
    up = _Axis([y for _, y in points] + ([] if panel.log else [0.0]), panel.log, TOP + PANEL, TOP)
    parts = [f'<text class="name" x="{LEFT}" y="22">{escape(panel.title)}</text>']
    for value in across.ticks:
        x = across.at(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + PANEL}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{TOP + PANEL + 16}" text-anchor="middle">{value:g}</text>')
    for value in up.ticks:
        y = up.at(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for series in panel.series:
        path = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in series.points)
        css = "line faint" if series.faint else "line"
        colour = colour_of[series.name]
        parts.append(f'<polyline class="{css}" stroke="{colour}" points="{path}"/>')
        if len(series.points) < FEW:
            parts += [
                f'<circle cx="{across.at(x):.1f}" cy="{up.at(y):.1f}" r="3.5" fill="{colour}"/>'
                for x, y in series.points
            ]
    middle = TOP + PANEL / 2
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{TOP + PANEL + 34}" text-anchor="middle">{escape(panel.x)}</text>')
    parts.append(
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(panel.y)}</text>'
    )  # fmt: skip
    return "".join(parts)


class _Axis:
    """Maps values to pixels between `begin` and `end`."""

    def __init__(self, values: Sequence[float], log: bool, begin: float, end: float) -> None:
        self.log, self.begin, self.end = log, begin, end
        low, high = min(values), max(values)
        if log:
            first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
            self.ticks = [10.0**power for power in range(first, last + 1)]
            self.low, self.high = low if last - first > 6 else 10.0**first, 10.0**last
        else:
            step = _round_step((high - low) / 6)
            self.ticks = [step * n for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
            self.low, self.high = low, high * 1.04 if low == 0 else high

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.begin + (self.end - self.begin) * (value - low) / (high - low)


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9))
