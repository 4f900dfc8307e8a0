"""How results are shown: tables on a terminal, plain lines in a pipe, JSON where it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cyclopts import Parameter
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deltaw.train.record import json_text
from deltaw.words import one_line

if TYPE_CHECKING:
    from deltaw.api.evaluate import Difference

T = TypeVar("T")
Flat = Annotated[T | None, Parameter(name="*")]
"""Settings of a class, each as a flag of its own."""


def json_line(record: Mapping[str, Any]) -> None:
    """Print one JSON object on a line of its own; what is no number becomes null."""
    sys.stdout.write(json_text(record) + "\n")
    sys.stdout.flush()


def facts(title: str, rows: Mapping[str, Any], as_json: bool, record: Mapping[str, Any] | None = None) -> None:
    """Show names and values; as JSON, `record` if it is given."""
    if as_json:
        return json_line(record if record is not None else rows)
    console = Console()
    if not console.is_terminal:
        for name, value in rows.items():
            console.print(f"{name}: {value}", soft_wrap=True, highlight=False, markup=False)
        return None
    table = Table(title=escape(title), title_justify="left", title_style="bold", show_header=False, box=box.SIMPLE)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(escape(name), escape(str(value)))
    return console.print(table)


def differences(d: Difference, there: str, known: bool) -> dict[str, str]:
    """Rows that say how what was written differs from the persona here; `known`: on rows of its own."""
    told = "" if known else " of one sentence, as the run's own rows are not here"
    return {
        "checked on": f"{d.tokens:,} tokens{told}, read back from disk",
        "max |Δlogit|": f"{d.max_logit_difference:.2e}",
        "same first choice": f"{d.top1_agreement:.2%}",
        "perplexity": f"{d.perplexity_before:.4f} with the adapter, {d.perplexity_after:.4f} {there} "
                      f"({d.perplexity_change:+.3%})",
    }  # fmt: skip


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Show a table: with rules on a terminal, with tabs in a pipe."""
    console = Console()
    if not console.is_terminal:
        for row in (columns, *rows):
            sys.stdout.write("\t".join(one_line(cell) for cell in row) + "\n")  # rich would make the tabs spaces
        return
    table = Table(box=box.ROUNDED, show_lines=True)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    console.print(table)


def notice(text: str) -> None:
    """Say something that a user should know; on stderr, so that results stay clean."""
    Console(stderr=True).print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def busy(quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Give a function that says what takes long; on stderr, so that results stay clean."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda line: None if quiet else console.print(line, highlight=False)
        return
    with console.status("Getting ready") as status:
        yield lambda line: status.update(line)
