"""Every wrong input ends in the panel that `docs/errors.md` shows, with its exit code, and nothing half-written.

    WRITE_ERRORS=1 python -m pytest tests/cli/test_wrong_inputs.py      # writes the page anew

Then read what changed in it: the page is what users will see.
"""

import io
import os
import re
import shlex

import pytest
from rich.console import Console
from small import ROOT
from wrong_inputs import WRONG

from deltaw.cli import app

PAGE = ROOT / "docs" / "errors.md"
HOME = "/home/you"


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shown(error, here):
    """The panel, with 100 columns, as the page has it."""
    for part in ("what", "where", "why", "remedy"):
        setattr(error, part, getattr(error, part).replace(str(here), HOME))
    page = Console(file=io.StringIO(), width=100)
    page.print(app.panel(error))
    return "\n".join(line.rstrip() for line in page.file.getvalue().splitlines())


def documented():
    """Title, command and panel of each entry of the page."""
    blocks = re.findall(r"^### ([^\n]+)\n\n```console\n\$ deltaw ([^\n]+)\n(.+?)\n```$", PAGE.read_text(), re.M | re.S)
    return {title: (command, panel) for title, command, panel in blocks}


@pytest.fixture
def met(here, monkeypatch, capsys):
    """A function that gives a wrong input, and the panel that came."""

    def met(wrong):
        errors = []
        panel = app.panel
        monkeypatch.setattr(app, "panel", lambda error: (errors.append(error), panel(error))[1])
        wrong.prepare(here, monkeypatch)
        before = files(here)
        capsys.readouterr()
        assert app.run(list(wrong.arguments)) == wrong.code
        out, err = capsys.readouterr()
        assert len([line for line in err.splitlines() if line.strip()]) <= 12, err
        assert "Traceback" not in out + err
        if not wrong.writes:
            assert files(here) == before
        litter = [name for name in files(here).keys() - before.keys() if re.search(r"(^|/)\.(?!lock$)", name)]
        assert litter == []
        monkeypatch.setattr(app, "panel", panel)
        (error,) = errors
        assert error.remedy or error.why
        return shown(error, here)

    return met


NEW = {}
"""Entries of the page as they are now, if it is written anew."""


@pytest.mark.parametrize("wrong", WRONG, ids=[wrong.title for wrong in WRONG])
def test_a_wrong_input_ends_in_the_panel_that_the_page_shows(met, wrong):
    entry = shlex.join(wrong.arguments), met(wrong)
    if "WRITE_ERRORS" in os.environ:
        NEW[wrong.title] = entry
    assert entry == {**documented(), **NEW}.get(wrong.title)


def test_the_page_shows_nothing_else():
    if NEW:
        blocks = [
            f"### {title}\n\n```console\n$ deltaw {command}\n{panel}\n```\n" for title, (command, panel) in NEW.items()
        ]
        PAGE.write_text(PAGE.read_text().split("### ")[0] + "\n".join(blocks))
    assert list(documented()) == [wrong.title for wrong in WRONG]
