"""A grid of coloured cells as inline SVG: one value for each kind of layer and each layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape

CELL, LEFT, BOTTOM, FAINT = 24, 100, 24, 0.12
PLACE = re.compile(r"layers\.(\d{1,4})\.(?:\w+\.)*(\w+) (\S+) (\d+\.\d+)")


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
    width, height = LEFT + CELL * columns, CELL * len(rows) + BOTTOM
    parts = []
    for y, (kind, row) in enumerate(rows.items()):
        parts.append(f'<text x="{LEFT - 8}" y="{CELL * y + 16}" text-anchor="end">{escape(kind)}</text>')
        for x, (form, value) in row.items():
            strength = FAINT + (1 - FAINT) * (value - low) / (high - low or 1)
            at = f'x="{LEFT + CELL * x + 1}" y="{CELL * y + 1}" width="{CELL - 2}" height="{CELL - 2}"'
            title = escape(f"layer {x}, {kind}: {form}, {value:.3f} bits")
            parts.append(f'<rect class="cell" {at} fill-opacity="{strength:.2f}"><title>{title}</title></rect>')
    parts += [f'<text x="{LEFT + CELL * x + CELL / 2}" y="{height - 6}" text-anchor="middle">{x}</text>'
              for x in range(0, columns, 5)]  # fmt: skip
    parts.append(f'<text x="{LEFT - 8}" y="{height - 6}" text-anchor="end">layer</text>')
    view = f'viewBox="0 0 {width} {height}" style="min-width:{width * 0.6:.0f}px"'
    title = f"Bits a number by layer, from {low:.2f} to {high:.2f}"
    return title, f'<svg class="chart" role="img" aria-label="{title}" {view}>{"".join(parts)}</svg>'
