"""A grid of coloured cells as inline SVG: one value for each kind of layer and each layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from deltaw.train.templates import rendered

FAINT = 0.12
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

    def strength(value: float) -> float:
        return FAINT + (1 - FAINT) * (value - low) / (high - low or 1)

    title = f"Bits a number by layer, from {low:.2f} to {high:.2f}"
    return title, rendered("heat.svg", rows=rows, columns=columns, strength=strength, title=title)
