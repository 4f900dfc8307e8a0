"""The templates beside this file: of the report, its charts and the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

HERE = Path(__file__).parent
PLACES = Environment(
    loader=FileSystemLoader(HERE), undefined=StrictUndefined, autoescape=lambda name: ".md." not in str(name)
)


def rendered(name: str, /, **values: Any) -> str:
    """A template with these values in it; text in HTML and SVG stays text, whatever it holds."""
    return PLACES.get_template(f"{name}.jinja").render(values)
