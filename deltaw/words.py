"""How numbers read: counted things, durations, sizes (1 GB = 10^9 bytes), counts, shares, sparklines, and safe text."""

import math
import re
from collections.abc import Sequence

UNKNOWN = "–"
BLOCKS = "▁▂▃▄▅▆▇█"


def some(number: int, noun: str) -> str:
    """Counted things: 1 row, 1,200 rows."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: 0.4 s, 25 s, 2 min 40 s, 3 h 5 min, 2 d 4 h."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    seconds = max(0.0, seconds)
    if 0 < seconds < 9.95:
        return f"{seconds:.1f} s"
    # Rounded at each unit before it is split, so that 59.6 s is never "60 s" and 7199 s never "1 h 60 min".
    if (whole := round(seconds)) < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if (minutes := round(seconds / 60)) < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def size(n_bytes: float | None) -> str:
    """Bytes with the unit that fits: 512 B, 1.5 KB, 1.9 GB."""
    return _scaled(n_bytes, (" B", " KB", " MB", " GB", " TB"))


def size_of(part_bytes: float, whole_bytes: float) -> str:
    """A part of some memory, the unit said once where it is the same: 1.9 of 23.4 GB."""
    part, whole = size(part_bytes), size(whole_bytes)
    same = part.split(" ")[-1] == whole.split(" ")[-1]
    return f"{part.split(' ')[0] if same else part} of {whole}"


def count(number: float | None) -> str:
    """A count with the suffix that fits: 950, 12.3 k, 4.9 M, 1.5 B."""
    return _scaled(number, ("", " k", " M", " B", " T"))


def _scaled(value: float | None, units: Sequence[str]) -> str:
    if value is None or not math.isfinite(value):
        return UNKNOWN
    power = 0
    # Judged as it will be shown, so that 999,950 is "1.0 M" and never "1000.0 k".
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.{1 if power and value < 99.95 else 0}f}{units[power]}"


def share(part: float, whole: float) -> str:
    """A part in per cent, with two significant digits: 3.6%, 0.047%."""
    return f"{100 * part / whole:#.2g}%".replace(".%", "%") if 0 < part < whole else "100%" if part else "0%"


def off(actual: float | None, predicted: float | None) -> str:
    """How far what happened is from what was predicted, in per cent: +4%, -2%."""
    if not actual or not predicted or not math.isfinite(actual / predicted):
        return UNKNOWN
    return f"{100 * (actual / predicted - 1):+.0f}%"


def loss(value: float | None) -> str:
    """A loss with three decimals; one that is not a number says so."""
    return UNKNOWN if value is None else f"{value:.3f}" if abs(value) < 1e4 or value != value else f"{value:.2g}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values as block characters between their own lowest and highest; × where not a number."""
    values = values[-width:]
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return "×" * len(values)
    low, span = min(finite), max(finite) - min(finite)
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round((v - low) / span * top) if span else 0] if math.isfinite(v) else "×" for v in values)


def visible(text: str) -> str:
    """Text with a mark in the place of each control code that a terminal would obey; line breaks and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def one_line(text: str, limit: int = 10**9) -> str:
    """Text on one line of at most `limit` characters, without the control codes that a terminal would obey."""
    flat = re.sub(r"\s*(?:[\x00-\x1f\x7f-\x9f\u2028\u2029]\s*)+", " ", text).strip()
    return flat if len(flat) <= limit else flat[: limit - 1].rstrip() + "…"
