"""Small charts as SVG text: axes, lines, points, bars. Colours are CSS classes of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Literal, NamedTuple

WIDTH, HEIGHT = 520, 320
Shape = Literal["dot", "ring", "diamond", "cross"]
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 16, 16, 52


class Point(NamedTuple):
    """A point in data units."""

    x: float
    y: float
    tip: str = ""
    """What the mouse is told."""
    label: str = ""
    """Written beside a mark."""


class Line(NamedTuple):
    """A curve."""

    points: Sequence[Point]
    css: str
    """Class of the stroke."""
    label: str = ""
    """Written at its end."""


class Marks(NamedTuple):
    """Points of one kind."""

    points: Sequence[Point]
    css: str
    shape: Shape = "dot"


class Rule(NamedTuple):
    """A straight line across the plot."""

    at: float
    axis: Literal["x", "y"]
    css: str
    label: str = ""


class Scale:
    """Data units to pixels along one axis."""

    def __init__(
        self, values: Sequence[float], low_px: float, high_px: float, *, log: bool = False
    ) -> None:
        usable = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [
            1.0 if log else 0.0
        ]
        self.log = log and max(usable) / min(usable) >= 10 if log else False
        low, high = min(usable), max(usable)
        if low == high:
            pad = abs(low) * 0.1 or 1.0
            low, high = low - pad, high + pad
        elif not self.log:
            pad = (high - low) * 0.05
            low, high = low - pad, high + pad
        else:
            low, high = low / 1.3, high * 1.3
        if not self.log and min(usable) >= 0 > low:
            low = 0.0
        self.low, self.high = low, high
        self._low_px, self._high_px = low_px, high_px

    def __call__(self, value: float) -> float:
        """The pixel of a value; what lies outside stays at the edge."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self._low_px + share * (self._high_px - self._low_px)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values to write beside the axis."""
        if self.log:
            exponents = range(
                math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1
            )
            steps = (1,) if len(exponents) > 4 else (1, 2, 5)
            marks = [step * 10.0**exponent for exponent in exponents for step in steps]
            return [mark for mark in marks if self.low <= mark <= self.high]
        raw = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) for index in range(first, last + 1)]


def number(value: float) -> str:
    """A short form: `0.02`, `1.5e-05`, `12,800`."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.2g}"
    if size >= 999.5:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def plot(
    *,
    x_label: str,
    y_label: str,
    title: str,
    lines: Sequence[Line] = (),
    marks: Sequence[Marks] = (),
    rules: Sequence[Rule] = (),
    x_log: bool = False,
    y_log: bool = False,
    height: int = HEIGHT,
) -> str:
    """Draws lines, points and rules on two labelled axes.

    Args:
        x_label: With its unit.
        y_label: With its unit.
        title: For screen readers.
        lines: Curves, later ones on top.
        marks: Points, above the curves.
        rules: Straight lines across.
        x_log: Use a logarithmic axis where values span a decade or more.
        y_log: The same for the other axis.
        height: In pixels of the drawing.
    """
    points = [point for line in lines for point in line.points]
    points += [point for group in marks for point in group.points]
    x_values = [point.x for point in points] + [rule.at for rule in rules if rule.axis == "x"]
    y_values = [point.y for point in points] + [rule.at for rule in rules if rule.axis == "y"]
    x = Scale(x_values, _LEFT, WIDTH - _RIGHT, log=x_log)
    y = Scale(y_values, height - _BOTTOM, _TOP, log=y_log)
    parts = [
        *_axes(x, y, x_label, y_label, height),
        *(_rule(rule, x, y, height) for rule in rules),
        *(_line(line, x, y) for line in lines),
        *(_mark(point, group, x, y) for group in marks for point in group.points),
        *_labels([(p, g.css) for g in marks for p in g.points], x, y),
    ]
    return _svg(parts, title, height)


def bars(rows: Sequence[tuple[str, float, str]], *, title: str, x_label: str) -> str:
    """Draws horizontal bars of shares between 0 and 1: label, share, what is written after it."""
    step, left = 44, 12
    height = step * len(rows) + 46
    right = WIDTH - 120
    parts = []
    for index, (label, share, note) in enumerate(rows):
        top = 8 + index * step
        parts += [
            _text(left, top + 12, label, "label"),
            _bar(left, top + 18, right - left, "track"),
            _bar(left, top + 18, max(2.0, share * (right - left)), "bar"),
            _text(right + 10, top + 29, note, "tick"),
        ]
    base = 8 + step * len(rows)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = left + share * (right - left)
        parts.append(_text(at, base + 10, f"{share:g}", f"tick {'' if share == 0 else 'middle'}"))
    parts.append(_text(left, base + 30, x_label, "axis"))
    return _svg(parts, title, height)


def _text(x: float, y: float, text: str, css: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _bar(x: float, y: float, width: float, css: str) -> str:
    box = f'x="{x}" y="{y}" width="{width:.1f}" height="12" rx="6"'
    return f'<rect class="{css}" {box}/>'


def _svg(parts: Sequence[str], title: str, height: int) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )


def _axes(x: Scale, y: Scale, x_label: str, y_label: str, height: int) -> list[str]:
    bottom, right = height - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for tick in y.ticks():
        at = y(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{right}"/>')
        parts.append(_text(_LEFT - 8, at + 4, number(tick), "tick end"))
    for tick in _spread([*x.ticks()]):
        at = x(tick)
        parts.append(f'<path class="axis-line" d="M{at:.1f} {bottom}v5"/>')
        parts.append(_text(at, bottom + 20, number(tick), "tick middle"))
    turned = f'<g transform="translate(16 {(_TOP + bottom) / 2}) rotate(-90)">'
    parts += [
        f'<path class="axis-line" d="M{_LEFT} {bottom}H{right}"/>',
        _text((_LEFT + right) / 2, height - 8, x_label, "axis middle"),
        turned + _text(0, 0, y_label, "axis middle") + "</g>",
    ]
    return parts


def _spread(ticks: list[float], most: int = 7) -> list[float]:
    """Every n-th tick, so that their texts do not touch."""
    return ticks[:: max(1, math.ceil(len(ticks) / most))]


def _rule(rule: Rule, x: Scale, y: Scale, height: int) -> str:
    css = f"rule {rule.css}"
    if rule.axis == "y":
        at = y(rule.at)
        text = _text(WIDTH - _RIGHT, at - 6, rule.label, f"tick end {rule.css}")
        return f'<path class="{css}" d="M{_LEFT} {at:.1f}H{WIDTH - _RIGHT}"/>{text}'
    at = x(rule.at)
    is_right = at > WIDTH * 0.8
    text = _text(
        at + (-5 if is_right else 5),
        _TOP + 10,
        rule.label,
        f"tick {'end' if is_right else ''} {rule.css}",
    )
    return f'<path class="{css}" d="M{at:.1f} {_TOP}V{height - _BOTTOM}"/>{text}'


def _line(line: Line, x: Scale, y: Scale) -> str:
    if not line.points:
        return ""
    path = "L".join(f"{x(p.x):.1f} {y(p.y):.1f}" for p in line.points)
    knots = "".join(_circle(p, x, y, f"{line.css} knot", 3) for p in line.points)
    last = line.points[-1]
    label = (
        _text(x(last.x), y(last.y) - 8, line.label, f"tick end {line.css}") if line.label else ""
    )
    return f'<path class="line {line.css}" d="M{path}"/>{knots}{label}'


def _circle(point: Point, x: Scale, y: Scale, css: str, radius: int) -> str:
    at = f'cx="{x(point.x):.1f}" cy="{y(point.y):.1f}" r="{radius}"'
    return f'<circle class="{css}" {at}><title>{escape(point.tip)}</title></circle>'


def _mark(point: Point, group: Marks, x: Scale, y: Scale) -> str:
    return _shape(x(point.x), y(point.y), group.shape, group.css, point.tip)


def _shape(x: float, y: float, shape: Shape, css: str, tip: str) -> str:
    told = f"<title>{escape(tip)}</title>" if tip else ""
    if shape in ("dot", "ring"):
        return f'<circle class="mark {shape} {css}" cx="{x:.1f}" cy="{y:.1f}" r="5">{told}</circle>'
    path = f"M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7-7z"
    if shape == "cross":
        path = f"M{x - 4:.1f} {y - 4:.1f}l8 8m0-8l-8 8"
    return f'<path class="mark {shape} {css}" d="{path}">{told}</path>'


def legend(entries: Sequence[tuple[Shape, str, str]]) -> str:
    """Says what marks stand for: (shape, class, words) each, as HTML."""
    words = "".join(
        '<span><svg viewBox="0 0 16 16" aria-hidden="true">'
        f"{_shape(8, 8, shape, css, '')}</svg>{escape(text)}</span>"
        for shape, css, text in entries
    )
    return f'<p class="key small soft">{words}</p>'


_LINE_PX, _CHARACTER_PX = 13.0, 6.6
"""Room that a label takes."""
_MOVES = (0, -1, 1, -2, 2, -3, 3, -4, 4)
"""Lines that a label may be moved by."""


def _labels(points: Sequence[tuple[Point, str]], x: Scale, y: Scale) -> list[str]:
    """Names beside their marks, moved up or down until none lies on another or on a mark."""
    boxes = [(x(point.x) - 6, x(point.x) + 6, y(point.y) + 4) for point, _ in points]
    named = [(point, css) for point, css in points if point.label]
    parts = []
    for point, css in sorted(named, key=lambda item: (y(item[0].y), x(item[0].x))):
        width = len(point.label) * _CHARACTER_PX
        at = x(point.x)
        is_right = at + 9 + width > WIDTH - 4
        left = at - 9 - width if is_right else at + 9
        top = y(point.y) + 4
        for step in _MOVES:
            moved = top + step * _LINE_PX
            if not any(
                left < end and left + width > start and abs(moved - line) < _LINE_PX
                for start, end, line in boxes
            ):
                top = moved
                break
        boxes.append((left, left + width, top))
        parts.append(
            _text(
                at - 9 if is_right else at + 9,
                top,
                point.label,
                f"tick {css}{' end' if is_right else ''}",
            )
        )
    return parts
