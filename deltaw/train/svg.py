"""Line charts as inline SVG: no script, no network. Colours come from the page, `report.css`.

A grid of coloured cells, too: one value for each kind of layer and each layer. And the templates beside this file.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Literal, TypeGuard

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deltaw.words import duration, loss, one_line, size

HERE = Path(__file__).parent
PLACES = Environment(loader=FileSystemLoader(HERE), undefined=StrictUndefined, keep_trailing_newline=True,
                     trim_blocks=True, autoescape=lambda name: ".md." not in str(name))  # fmt: skip
PLACES.filters |= {"duration": duration, "exp": math.exp, "loss": loss, "one_line": one_line, "size": size,
                   "cell": lambda value: one_line(str(value)).replace("|", "\\|")}  # fmt: skip

Point = tuple[float, float | None]

HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 250, 58, 14, 34, 28
LINE_POINTS, HOVERS = 1200, 160
FAINT = 0.12
PLACE = re.compile(r"layers\.(\d{1,4})\.(?:\w+\.)*(\w+) (\S+) (\d+\.\d+)")
FLAT = 1e-6
"""Values that differ by less than this share are drawn as equal: it is noise of the arithmetic."""


def known(y: float | None) -> TypeGuard[float]:
    """Whether there is a number to draw."""
    return y is not None and math.isfinite(y)


@dataclass(frozen=True, kw_only=True)
class Series:
    """Values over x under one name; `points` draws circles, `faint` a thin line without an entry in the legend."""

    name: str
    points: Sequence[Point]
    color: Literal[1, 2] = 1
    kind: Literal["line", "faint", "points"] = "line"

    def finite(self) -> list[tuple[float, float]]:
        """The points that can be drawn."""
        return [(x, y) for x, y in self.points if known(y)]


class Frame:
    """The plane of one chart: data to pixels, y down."""

    left, top, bottom, height = LEFT, TOP, HEIGHT - BOTTOM, HEIGHT

    def __init__(self, points: Sequence[tuple[float, float]], width: int, from_zero: bool) -> None:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        self.width, self.right = width, width - RIGHT
        self.x_low, self.x_high = (min(xs), max(xs)) if min(xs) < max(xs) else (xs[0] - 0.5, xs[0] + 0.5)
        low, high = min(0.0, *ys) if from_zero else min(ys), max(ys)
        if high - low <= FLAT * max(abs(low), abs(high)):
            low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
        self.y_ticks = ticks(low, high, 5, cover=True)
        # Steps are whole: no tick at 1.5.
        self.x_ticks = [t for t in ticks(self.x_low, self.x_high, width // 80) if t == int(t)]

    def x(self, value: float) -> float:
        """Pixels from the left."""
        return round(self.left + (self.right - self.left) * (value - self.x_low) / (self.x_high - self.x_low), 1)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return round(self.top + (self.bottom - self.top) * (high - value) / (high - low), 1)

    def path(self, points: Sequence[Point]) -> str:
        """A line through the points, with a gap where there is none."""
        drawn = [f"{self.x(x)} {self.y(y)}" if known(y) else "" for x, y in _thinned(points)]
        return "".join(f"M{'L'.join(stretch)}" for there, stretch in groupby(drawn, bool) if there)

    def hovers(self, series: Sequence[Series], said: Callable[[float], str]
               ) -> Iterator[tuple[float, float, float, str]]:  # fmt: skip
        """Where values are told: a line, the edges of the area around it, and what is said there."""
        told: dict[float, list[str]] = {}
        for s in series:
            for x, y in s.points:
                value = said(y) if known(y) else "not a number"
                told.setdefault(x, []).append(f"{s.name} {value}")
        xs = sorted(told)
        always = {x for s in series if s.kind == "points" for x, _ in s.points}
        stride = math.ceil(len(xs) / HOVERS)
        xs = [x for i, x in enumerate(xs) if i % stride == 0 or x in always]
        edges = [self.x_low, *((a + b) / 2 for a, b in pairwise(xs)), self.x_high]
        for x, (start, end) in zip(xs, pairwise(edges), strict=True):
            yield self.x(x), self.x(start), self.x(end), "\n".join([f"step {x:,.0f}", *told[x]])


def line_chart(label: str, series: Sequence[Series], *, words: Callable[[float], str] = "{:g}".format, width: int = 560,
               mark: tuple[float, float, str] | None = None, from_zero: bool = False) -> str:  # fmt: skip
    """Draw series over steps; `label` is read aloud, `words` writes a y value, and hovering tells the values.

    `mark`: one point, and words beside it.
    """
    drawn = [point for s in series for point in s.finite()]
    frame = Frame(drawn, width, from_zero) if drawn else None
    return rendered("chart.svg", label=label, frame=frame, series=series, said=words, mark=mark)


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
        if not known(value):
            out.append(None)
            continue
        mean, seen = weight * mean + (1 - weight) * value, weight * seen + (1 - weight)
        out.append(mean / seen)
    return out


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
    return point[1] if known(point[1]) else math.inf


def placed(told: Iterable[str]) -> dict[str, dict[int, tuple[str, float]]]:
    """Formats and bits by the kind of a layer and its number, of lines such as "layers.3.mlp.up_proj nf3 3.500"."""
    found: dict[str, dict[int, tuple[str, float]]] = {}
    for line in told:
        if said := PLACE.fullmatch(line):
            found.setdefault(said[2], {})[int(said[1])] = said[3], float(said[4])
    return found


def heat(rows: Mapping[str, Mapping[int, tuple[str, float]]]) -> tuple[str, str]:
    """A title, and the bits of layers drawn: the more, the stronger the colour; hovering tells the format."""
    bits = [value for row in rows.values() for _, value in row.values()]
    low, high, columns = min(bits), max(bits), 1 + max(i for row in rows.values() for i in row)

    def strength(value: float) -> float:
        return FAINT + (1 - FAINT) * (value - low) / (high - low or 1)

    title = f"Bits a number by layer, from {low:.2f} to {high:.2f}"
    return title, rendered("heat.svg", rows=rows, columns=columns, strength=strength, title=title)


def rendered(name: str, /, **values: Any) -> str:
    """A template with these values in it; text in HTML and SVG stays text, whatever it holds."""
    return PLACES.get_template(f"{name}.jinja").render(values)
