"""The report's charts: inline SVG that scales with the page and keeps its text at reading size.

Horizontal positions are percentages of the chart's width, heights are pixels, so a chart fits a phone and a wide
screen without JavaScript. Colours are classes of the page's style sheet, which knows light and dark. Every string
is escaped as it is put in; numbers are formatted, never interpolated raw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from stillroom.evaluation.statistics import GapClosed, Interval
from stillroom.evaluation.wording import percent, share

_SVG = Markup('<svg class="chart {}" role="img" width="100%" height="{}"><title>{}</title>{}</svg>')


def gap_chart(gap: GapClosed, base: Interval, teacher: Interval, student: Interval) -> Markup:
    """From base to teacher on one axis, the part that the student closed filled in."""
    top = _nice(max(base.high, teacher.high, student.high) * 1.02)
    parts = [_axis(top, 118, 150)]
    left, right = _x(min(gap.base, gap.teacher), top), _x(max(gap.base, gap.teacher), top)
    parts.append(_rect("gap-open", left, 72, right - left, 16, 3))
    if gap.value is not None and gap.value > 0:
        end = _x(gap.student, top)
        parts.append(_rect("gap-closed", left, 72, end - left, 16, 3))
    for role, value in (("base", base), ("teacher", teacher), ("student", student)):
        parts.append(_whisker(role, value, top, 80, 7))
        parts.append(_dot(role, _x(value.value, top), 80, 7))
    parts.append(_label("student", student.value, top, 50, f"student {share(student.value)}", strong=True))
    crowded = abs(_x(teacher.value, top) - _x(base.value, top)) < 34
    parts.append(_label("base", base.value, top, 112, f"base {share(base.value)}"))
    parts.append(_label("teacher", teacher.value, top, 28 if crowded else 112, f"teacher {share(teacher.value)}"))
    title = f"Accuracy: base {share(base.value)}, student {share(student.value)}, teacher {share(teacher.value)}"
    return _svg("gap", 150, title, parts)


def interval_bar(role: str, value: Interval, top: float) -> Markup:
    """A bar from zero with its interval."""
    parts = [_grid(top, 26), _rect(role, 0, 7, _x(value.value, top), 12, 3), _whisker("on-bar", value, top, 13, 5)]
    title = f"{share(value.value)}, interval {share(value.low)} to {share(value.high)}, n = {value.n}"
    return _svg("bar", 26, title, parts)


def axis(top: float) -> Markup:
    """The scale beneath a group of bars."""
    return _svg("axis", 22, f"scale from 0 to {share(top)}", [_axis(top, 4, 22)])


def stacked_bar(parts: Sequence[tuple[str, int, str]]) -> Markup:
    """Shares of a whole, each `(class, count, label)`; a count is written where it fits."""
    total = sum(count for _, count, _ in parts) or 1
    out, left = [], 0.0
    for css, count, label in parts:
        width = 100 * count / total
        box = Markup("<g><title>{}: {} ({})</title>").format(label, count, percent(count / total))
        out.append(box + _rect(css, left, 2, max(0.0, width - 0.25), 26, 2))
        if width >= 7:
            out.append(_text("on-fill", left + width / 2, 20, str(count), "middle"))
        out.append(Markup("</g>"))
        left += width
    return _svg("stack", 30, ", ".join(f"{label} {count}" for _, count, label in parts), out)


def strip(role: str, values: Sequence[float], median: Interval, p95: float, top: float) -> Markup:
    """Every measured call as a point, with the median, its interval and the 95th percentile."""
    parts = [_grid(top, 34)]
    # A fixed scatter keeps points apart and the page the same from run to run.
    parts += [_dot(f"{role} faint", _x(value, top), 9 + 16 * ((i * 0.618) % 1), 3) for i, value in enumerate(values)]
    parts.append(_line("p95", _x(p95, top), 4, _x(p95, top), 30))
    parts.append(_whisker(role, median, top, 17, 9))
    parts.append(_line(f"{role} median", _x(median.value, top), 3, _x(median.value, top), 31))
    return _svg("strip", 34, f"{len(values)} calls, median {median.value:.3f} s, p95 {p95:.3f} s", parts)


def curve(points: Sequence[tuple[int, float]], second: Sequence[tuple[int, float]] = ()) -> Markup:
    """Loss over steps: each point faint, a running mean on top, and the validation loss as dots."""
    both = [*points, *second]
    if len(both) < 2:
        return Markup("")
    last = max(step for step, _ in both) or 1
    top = _nice(_high([loss for _, loss in both]))
    parts = [_y_axis(top, 180), Markup('<svg x="0" y="10" width="100%" height="170" viewBox="0 0 100 100"')]
    parts.append(Markup(' preserveAspectRatio="none" overflow="visible">'))
    for css, line in (("raw", points), ("mean", _smooth(points))):
        if len(line) > 1:
            path = " ".join(f"{100 * step / last:.2f},{100 - 100 * min(loss, top) / top:.2f}" for step, loss in line)
            parts.append(
                Markup('<polyline class="{}" points="{}" vector-effect="non-scaling-stroke"/>').format(css, path)
            )
    parts.append(Markup("</svg>"))
    parts += [_dot("validation", 100 * step / last, 10 + 170 * (1 - min(loss, top) / top), 4) for step, loss in second]
    for step in (0, last // 2, last):
        anchor = "start" if step == 0 else "end" if step == last else "middle"
        parts.append(_text("tick", 100 * step / last, 200, f"step {step:,}" if step == last else f"{step:,}", anchor))
    return _svg("curve", 206, f"training loss over {last} steps, {points[0][1]:.2f} to {points[-1][1]:.2f}", parts)


def scale_top(values: Sequence[float]) -> float:
    """A round end for an axis that must hold all values."""
    return _nice(max([*values, 1e-9]))


def _nice(value: float) -> float:
    """The least of 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10 times a power of ten that is not below the value."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if step * power >= value * (1 - 1e-9))


def _high(losses: Sequence[float]) -> float:
    """Where the axis ends: above all but the wildest losses, so that one spike does not flatten the curve."""
    ordered = sorted(loss for loss in losses if math.isfinite(loss)) or [1.0]
    return max(ordered[int(0.98 * (len(ordered) - 1))] * 1.1, 1e-6)


def _smooth(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential running mean, corrected for its start (as Adam's moments are)."""
    decay, mean, out = 1 - 1 / max(1.0, len(points) / 30), 0.0, []
    for i, (step, loss) in enumerate(points, 1):
        mean = decay * mean + (1 - decay) * loss
        out.append((step, mean / (1 - decay**i)))
    return out


def _x(value: float, top: float) -> float:
    return 100 * min(max(value / top, 0.0), 1.0)


def _svg(css: str, height: int, title: str, parts: Sequence[Markup]) -> Markup:
    return _SVG.format(css, height, title, Markup("").join(parts))


def _axis(top: float, y: int, height: int) -> Markup:
    """Grid lines down to `y`, and the numbers of the scale below."""
    out = [] if y < 20 else [_grid(top, y)]
    for i in range(5):
        anchor = "start" if i == 0 else "end" if i == 4 else "middle"
        out.append(_text("tick", 25 * i, height - 5, f"{top * i / 4:.3g}", anchor))
    return Markup("").join(out)


def _grid(top: float, height: float) -> Markup:
    return Markup("").join(_line("grid", 25 * i, 0, 25 * i, height) for i in range(5))


def _y_axis(top: float, bottom: int) -> Markup:
    out = []
    for i in range(3):
        y = 10 + (bottom - 10) * i / 2
        out += [_line("grid", 0, y, 100, y), _text("tick", 100, y - 3, f"{top * (2 - i) / 2:.3g}", "end")]
    return Markup("").join(out)


def _rect(css: str, x: float, y: float, width: float, height: float, radius: int) -> Markup:
    shape = '<rect class="{}" x="{:.3f}%" y="{:.1f}" width="{:.3f}%" height="{:.1f}" rx="{}"/>'
    return Markup(shape).format(css, x, y, max(0.0, width), height, radius)


def _line(css: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    shape = '<line class="{}" x1="{:.3f}%" y1="{:.1f}" x2="{:.3f}%" y2="{:.1f}"/>'
    return Markup(shape).format(css, x1, y1, x2, y2)


def _dot(css: str, x: float, y: float, radius: float) -> Markup:
    return Markup('<circle class="{}" cx="{:.3f}%" cy="{:.1f}" r="{}"/>').format(css, x, y, radius)


def _whisker(css: str, value: Interval, top: float, y: float, half: float) -> Markup:
    low, high = _x(value.low, top), _x(value.high, top)
    ends = [_line(f"whisker {css}", x, y - half, x, y + half) for x in (low, high)]
    return Markup("").join([_line(f"whisker {css}", low, y, high, y), *ends])


def _label(css: str, value: float, top: float, y: float, text: str, *, strong: bool = False) -> Markup:
    x = _x(value, top)
    anchor = "start" if x < 12 else "end" if x > 88 else "middle"
    return _text(f"label {css}{' strong' if strong else ''}", x, y, text, anchor)


def _text(css: str, x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text class="{}" x="{:.3f}%" y="{:.1f}" text-anchor="{}">{}</text>').format(css, x, y, anchor, text)
