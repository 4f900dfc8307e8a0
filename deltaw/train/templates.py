"""The templates beside this file: of the report, its charts and the model card."""

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deltaw.words import duration, loss, one_line, size

HERE = Path(__file__).parent
PLACES = Environment(loader=FileSystemLoader(HERE), undefined=StrictUndefined, keep_trailing_newline=True,
                     trim_blocks=True, autoescape=lambda name: ".md." not in str(name))  # fmt: skip
PLACES.filters |= {"duration": duration, "exp": math.exp, "loss": loss, "one_line": one_line, "size": size,
                   "cell": lambda value: one_line(str(value)).replace("|", "\\|")}  # fmt: skip


def rendered(name: str, /, **values: Any) -> str:
    """A template with these values in it; text in HTML and SVG stays text, whatever it holds."""
    return PLACES.get_template(f"{name}.jinja").render(values)
