"""Line charts as inline SVG: no script, no network. Colours come from the page, `report.css`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

Point = tuple[float, float | None]

HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 250, 58, 14, 34, 28
LINE_POINTS, HOVERS = 1200, 160
FLAT = 1e-6
"""Values that differ by less than this share are drawn as equal: it is noise of the arithmetic."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Values over x under one name; `points` draws circles, `faint` a thin line without an entry in the legend."""

    name: str
    points: Sequence[Point]
    color: Literal[1, 2] = 1
    kind: Literal["line", "faint", "points"] = "line"

    def finite(self) -> list[tuple[float, float]]:
        """The points that can be drawn."""
        return [(x, y) for x, y in self.points if y is not None and math.isfinite(y)]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One point with words beside it."""

    x: float
    y: float
    text: str


class Frame:
    """The plane of one chart: data to pixels, y down."""

    def __init__(self, points: Sequence[tuple[float, float]], width: int, from_zero: bool) -> None:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        self.width = width
        self.x_low, self.x_high = (min(xs), max(xs)) if min(xs) < max(xs) else (xs[0] - 0.5, xs[0] + 0.5)
        low, high = min(0.0, *ys) if from_zero else min(ys), max(ys)
        if high - low <= FLAT * max(abs(low), abs(high)):
            low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
        self.y_ticks = ticks(low, high, 5, cover=True)
        self.y_low, self.y_high = self.y_ticks[0], self.y_ticks[-1]

    def x(self, value: float) -> float:
        """Pixels from the left."""
        inside = self.width - LEFT - RIGHT
        return round(LEFT + inside * (value - self.x_low) / (self.x_high - self.x_low), 1)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        inside = HEIGHT - TOP - BOTTOM
        return round(TOP + inside * (self.y_high - value) / (self.y_high - self.y_low), 1)


def line_chart(label: str, series: Sequence[Series], *, words: Callable[[float], str] = "{:g}".format,
               mark: Mark | None = None, width: int = 560, from_zero: bool = False) -> str:  # fmt: skip
    """Draw series over steps; `label` is read aloud, `words` writes a y value, and hovering tells the values."""
    drawn = [point for s in series for point in s.finite()]
    if not drawn:
        return f'<p class="empty">{escape(label)}: nothing was measured.</p>'
    frame = Frame(drawn, width, from_zero)
    named = [s for s in series if s.kind != "faint"]
    skipped = 0 if len(named) > 1 else TOP - 14  # one curve is named by its heading, and needs no room for a legend
    parts = [*_axes(frame, words), *(_legend(named, width) if not skipped else ())]
    parts += [_line(frame, s) for s in series if s.kind != "points"]
    parts += _hovers(frame, series, words)
    for s in series:
        points = s.finite()
        if s.kind == "points" or len(points) == 1:
            parts += [_circle(frame, x, y, f"s{s.color}") for x, y in points]
    if mark is not None:
        parts.append(_mark(frame, mark))
    view = f'viewBox="0 {skipped} {width} {HEIGHT - skipped}" style="min-width:{width * 0.6:.0f}px"'
    return f'<svg class="chart" role="img" aria-label="{escape(label)}" {view}>{"".join(parts)}</svg>'


def ticks(low: float, high: float, most: int, *, cover: bool = False) -> list[float]:
    """At most about `most` round values from low to high; `cover`: the first and last lie on or beyond the ends."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    stride = next(m * unit for m in (1, 2, 2.5, 5, 10, 20) if m * unit >= rough * (1 - 1e-9))
    first, last = low / stride, high / stride
    first, last = (math.floor(first + 1e-9), math.ceil(last - 1e-9)) if cover else (math.ceil(first), math.floor(last))
    # Through the shortest decimal, so that 3 * 0.1 is 0.3.
    return [float(f"{i * stride:.12g}") for i in range(int(first), int(last) + 1)]


def smooth(values: Sequence[float | None], weight: float = 0.9) -> list[float | None]:
    """The exponential moving average, unbiased at its start; where a value is missing or not a number, so is it."""
    mean, seen, out = 0.0, 0.0, list[float | None]()
    for value in values:
        if value is None or not math.isfinite(value):
            out.append(None)
            continue
        mean, seen = weight * mean + (1 - weight) * value, weight * seen + (1 - weight)
        out.append(mean / seen)
    return out


def _axes(frame: Frame, words: Callable[[float], str]) -> Iterator[str]:
    right, bottom = frame.width - RIGHT, HEIGHT - BOTTOM
    for value in frame.y_ticks:
        y = frame.y(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(words(value))}</text>'
    yield f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
    # Steps are whole: no tick at 1.5.
    for value in [t for t in ticks(frame.x_low, frame.x_high, frame.width // 80) if t == int(t)]:
        x = frame.x(value)
        yield f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>'
        yield f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{value:,.0f}</text>'
    yield f'<text x="{LEFT - 8}" y="{bottom + 18}" text-anchor="end">step</text>'


def _legend(series: Sequence[Series], width: int) -> Iterator[str]:
    x = width - RIGHT
    for s in reversed(series):
        x -= 7 * len(s.name)
        yield f'<text x="{x}" y="16">{escape(s.name)}</text>'
        shape = f'<circle class="s{s.color}" cx="{x - 13}" cy="12" r="4"/>'
        line = f'<path class="s{s.color}" d="M{x - 20} 12h14"/>'
        yield shape if s.kind == "points" else line
        x -= 36


def _line(frame: Frame, s: Series) -> str:
    path, pen_is_down = [], False
    for x, y in _thinned(s.points):
        if y is None or not math.isfinite(y):
            pen_is_down = False
            continue
        path.append(f"{'L' if pen_is_down else 'M'}{frame.x(x)} {frame.y(y)}")
        pen_is_down = True
    return f'<path class="s{s.color} {s.kind}" d="{"".join(path)}"/>'


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """Long curves by the lowest and highest point of each stretch, so that no spike goes missing."""
    stretch = math.ceil(2 * len(points) / LINE_POINTS)
    if stretch < 3:
        return points
    kept: list[Point] = []
    for at in range(0, len(points), stretch):
        some = points[at : at + stretch]
        kept += sorted({min(some, key=_height), max(some, key=_height)}, key=lambda point: point[0])
    return kept


def _height(point: Point) -> float:
    y = point[1]
    return y if y is not None and math.isfinite(y) else math.inf


def _hovers(frame: Frame, series: Sequence[Series], words: Callable[[float], str]) -> Iterator[str]:
    told: dict[float, list[str]] = {}
    for s in series:
        for x, y in s.points:
            value = "not a number" if y is None or not math.isfinite(y) else words(y)
            told.setdefault(x, []).append(f"{s.name} {value}")
    xs = sorted(told)
    always = {x for s in series if s.kind == "points" for x, _ in s.points}
    stride = math.ceil(len(xs) / HOVERS)
    xs = [x for i, x in enumerate(xs) if i % stride == 0 or x in always]
    edges = [frame.x_low, *((a + b) / 2 for a, b in pairwise(xs)), frame.x_high]
    for x, (start, end) in zip(xs, pairwise(edges), strict=True):
        left, at, bottom = frame.x(start), frame.x(x), HEIGHT - BOTTOM
        title = escape("\n".join([f"step {x:,.0f}", *told[x]]))
        line = f'<line x1="{at}" x2="{at}" y1="{TOP}" y2="{bottom}"/>'
        area = f'<rect x="{left}" y="{TOP}" width="{frame.x(end) - left:.1f}" height="{bottom - TOP}"/>'
        yield f'<g class="hover"><title>{title}</title>{line}{area}</g>'


def _circle(frame: Frame, x: float, y: float, color: str) -> str:
    return f'<circle class="{color}" cx="{frame.x(x)}" cy="{frame.y(y)}" r="4" pointer-events="none"/>'


def _mark(frame: Frame, mark: Mark) -> str:
    x, y = frame.x(mark.x), frame.y(mark.y)
    # Above the point, for the train loss mostly runs below it; turned inwards at the edges.
    anchor = "start" if x < LEFT + 60 else "end" if x > frame.width - RIGHT - 60 else "middle"
    text_y = y - 14 if y > TOP + 16 else y + 22
    return (f'<g class="mark" pointer-events="none"><circle cx="{x}" cy="{y}" r="6"/>'
            f'<text x="{x}" y="{text_y}" text-anchor="{anchor}">{escape(mark.text)}</text></g>')  # fmt: skip
