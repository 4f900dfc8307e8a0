"""`deltaw data check`: what a model would learn from the data, and what is wrong with it."""

import json as encoding
from contextlib import ExitStack
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.text import Text

from deltaw.cli.show import busy, facts
from deltaw.data.check import DROPPED, FAULTY, SHOWN, UNLEARNT, Checked, check as looked_at
from deltaw.data.encode import Encoded, TrainOn
from deltaw.data.files import split_weight
from deltaw.data.rows import Example
from deltaw.errors import UserError
from deltaw.files.atomic import refuse, replacing
from deltaw.models.tokenizer import Tokenizer
from deltaw.settings import Count
from deltaw.words import one_line, some, sparkline, visible

LONGEST_SHOWN = 700
"""Tokens of an example that are shown."""
LONGEST_PLACE = 160
"""Characters of a finding that are shown."""


def check(*files: str, base: str = "smollm2-135m", val: Path | None = None, train_on: TrainOn = "answers",
          max_tokens: Count | None = None, fix: Path | None = None, json: bool = False) -> int:  # fmt: skip
    """Show what the model would learn from the rows, and what is wrong with them; exit code 2 if rows are faulty.

    Parameters
    ----------
    files
        Files of rows; a weight, as in rows.jsonl:2, is passed over.
    base
        The model whose tokenizer and template are used.
    val
        Validation rows: those that are also trained on are found.
    train_on
        Learn only the answers of the assistant, or every token.
    max_tokens
        Longer rows are cut. By default: what the model can see.
    fix
        Write the rows that are left without faults, doubles, leaks and rows with nothing to learn to this file.
    json
        Print one JSON object.
    """
    from deltaw.models import source
    from deltaw.models.checkpoint import read_config

    if not files:
        raise UserError("There is no data to check.", remedy="deltaw data check FILE.jsonl")
    if fix is not None and fix.suffix != ".jsonl":
        raise UserError("Rows are written as .jsonl.", where=str(fix), remedy="For example: --fix fixed.jsonl")
    if fix is not None:
        refuse(fix, "--fix")
    with busy(json) as say, ExitStack() as stack:
        path = source.find(base, say)
        config = read_config(path)
        tokenizer = Tokenizer.load(path)
        kept = []
        out = stack.enter_context(stack.enter_context(replacing(fix)).open("w", encoding="utf-8")) if fix else None

        def keep(row: Example) -> None:
            kept.append(1)
            if out is not None:
                out.write(encoding.dumps(_row(row), ensure_ascii=False) + "\n")

        limit = min(max_tokens or config.context, config.context)
        found = looked_at([split_weight(file)[0] for file in files], val, tokenizer, train_on, limit, keep)
        if fix and not kept:
            raise UserError("No row is left to be written.", why="Every row is faulty, double, leaked or empty.")
    _report(found, tokenizer, limit, json, f"{len(kept):,} rows to {fix}" if fix else "")
    return UserError.code if FAULTY in found.places and not fix else 0


def _report(found: Checked, tokenizer: Tokenizer, limit: int, as_json: bool, fixed: str) -> None:
    lengths = {"median": found.quantile(0.5), "95 %": found.quantile(0.95), "longest": max(found.lengths, default=0)}
    rows = {
        "rows": f"{found.rows:,}",
        "tokens": f"{found.tokens:,}, of which {found.trained_tokens:,} are learnt",
        "tokens a row": ", ".join(f"{name} {n:,}" for name, n in lengths.items()) + f" (cut at {limit:,})",
        "by length": f"{sparkline(found.histogram(), 40)}  1 to {lengths['longest']:,}",
    }
    for finding, places in found.places.items():
        more = f" and {len(places) - SHOWN:,} more" if len(places) > SHOWN else ""
        shown = "; ".join(one_line(place, LONGEST_PLACE) for place in places[:SHOWN])
        rows[finding] = f"{len(places):,}: {shown}{more}"
    if found.unread:
        rows["keys passed over"] = ", ".join(f"{key} ({some(n, 'row')})" for key, n in found.unread.most_common())
    if not found.rows:
        raise UserError("The data files have no rows.")
    if not found.places:
        rows["found"] = "nothing wrong"
    elif not found.trained_tokens and UNLEARNT in found.places:
        rows["remedy"] = "rows need an assistant's answer, or take --train-on all"
    elif not fixed and any(finding in found.places for finding in DROPPED):
        rest = "those that are faulty, double, leaked or teach nothing"
        rows["remedy"] = f"--fix OUT.jsonl writes the rows without {rest}"
    if fixed:
        rows["written"] = fixed
    record = {"rows": found.rows, "tokens": found.tokens, "trained_tokens": found.trained_tokens, "lengths": lengths,
              "histogram": found.histogram(), "found": found.places, "passed_over": found.unread,
              "examples": [asdict(e) for e in found.shown]}  # fmt: skip
    if not as_json:
        console = Console()
        for example in found.shown:
            console.print(Text(f"{example.where}", style="dim"))
            console.print(coloured(example, tokenizer, limit), soft_wrap=not console.is_terminal)
    facts("Data", rows, as_json, record)


def coloured(row: Encoded, tokenizer: Tokenizer, limit: int) -> Text:
    """The row as the model sees it: «what is learnt» in green, [cut: what is cut] struck out."""
    text, stop = Text(), 0
    kinds = ((learnt, i >= limit) for i, learnt in enumerate(row.trained[:LONGEST_SHOWN]))
    for (learnt, cut), alike in groupby(kinds):
        start, stop = stop, stop + len(list(alike))
        piece = visible(tokenizer.decode(row.ids[start:stop]))
        style = "red strike" if cut else "green" if learnt else "dim"
        text.append(f"[cut: {piece}]" if cut else f"«{piece}»" if learnt else piece, style=style)
    if len(row.ids) > LONGEST_SHOWN:
        text.append(f" … {len(row.ids) - LONGEST_SHOWN:,} more tokens", style="dim")
    return text


def _row(row: Example) -> dict[str, object]:
    """A row as a line of a file."""
    turns = [turn | {"weight": 0} if i in row.silent else turn for i, turn in enumerate(row.messages)]
    body: dict[str, object] = {"messages": turns} if turns else {"text": row.text}
    return body | {k: list(v) for k, v in (("references", row.references), ("facts", row.facts)) if v}
