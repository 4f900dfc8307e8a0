"""What the documents show is what happens: commands are taken, flags exist, links lead somewhere, examples run."""

import contextlib
import functools
import io
import re
import shlex

import pytest
import torch
from oracles import our_logits
from small import ROOT, told

import deltaw
from deltaw.adapters.adapter import Adapter, Method, Site
from deltaw.cli.app import COMMANDS, application, run
from deltaw.methods import names
from deltaw.models.slots import Delta, Linear, Parts
from deltaw.scoring.text import MEANINGS
from deltaw.settings import settings

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
THEIRS = {"--use_cpu"}
"""Flags of other tools that the documents speak of."""


def code(text):
    """Every line of a code block, and every piece of code within a sentence."""
    blocks = re.findall(r"^[ ]*```\w*\n(.*?)^[ ]*```", text, re.M | re.S)
    indented = re.findall(r"^    (\S.*)$", text, re.M)
    spoken = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return [line.strip() for block in blocks for line in block.splitlines()] + indented + spoken


COMMAND_LINES = sorted({(page, line.partition("#")[0].strip()) for page, text in TEXTS.items() for line in code(text)
                        if re.match(r"deltaw [a-z]", line)})  # fmt: skip


def test_there_is_something_to_check():
    assert {"README.md", "CONTRIBUTING.md", "docs/structure.md", "docs/methods/lora.md"} <= TEXTS.keys()
    assert {line.split()[1] for _, line in COMMAND_LINES} == set(COMMANDS)


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES)
def test_a_command_that_is_shown_is_one_that_is_taken(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(line.replace("--method mine", "--method lora"))[1:]
    application(arguments).parse_args(arguments, exit_on_error=False, print_error=False)


@pytest.fixture(scope="module")
def known():
    """Every flag that some command has."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv("COLUMNS", "200")
        for command in (
            [],
            *([c] for c in COMMANDS),
            *(["train", "--method", name] for name in names()),
            ["data", "check"],
        ):
            run([*command, "--help"])
    return set(re.findall(r"--[a-z][a-z-]+", said.getvalue())) | {"--debug"}


@pytest.mark.parametrize(
    "page",
    [
        page
        for page in TEXTS
        if page.startswith(("README", "docs/methods", "docs/structure", "docs/data", "docs/exchange"))
    ],
)
def test_a_flag_that_is_named_exists(page, known):
    named = {flag for line in code(TEXTS[page]) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", line)}
    assert "--rank" in known
    assert named - THEIRS <= known


@pytest.mark.parametrize("page", TEXTS)
def test_a_link_within_the_project_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", TEXTS[page])
    missing = [link for link in links if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()]
    assert missing == []


def blocks(page):
    return re.findall(r"```python\n(.*?)```", re.sub(r"(?m)^   (?=\S|  )", "", TEXTS[page]), re.S)


def test_the_example_in_python_runs(tiny_path, tmp_path, monkeypatch, capsys):
    (example,) = blocks("README.md")
    monkeypatch.chdir(ROOT)
    quick = {**told(tiny_path, tmp_path, steps=1, evaluations=0), "listen": []}
    monkeypatch.setattr(deltaw, "finetune", functools.partial(deltaw.finetune, **quick))
    exec(compile(example, "README.md", "exec"), {})
    config = (tmp_path / "runs" / "run" / "config.yaml").read_text()
    assert "rank: 8" in config
    assert capsys.readouterr().out.strip()


def test_the_method_that_contributors_are_shown_works(tiny, ids):
    names = {"Delta": Delta, "Method": Method, "Site": Site, "Linear": Linear, "Parts": Parts, "settings": settings,
             "torch": torch, "nn": torch.nn, "Tensor": torch.Tensor, "__name__": __name__}  # fmt: skip
    for block in blocks("CONTRIBUTING.md"):
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    bare = our_logits(tiny, ids)
    adapter = Adapter.build(names["Gain"](), tiny)
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    with adapter.on():
        worn = our_logits(tiny, ids)
    adapter.merge()
    torch.testing.assert_close(our_logits(tiny, ids), worn, rtol=0, atol=1e-4)
    assert (worn - bare).abs().max() > 0.01


def test_the_page_of_metrics_has_every_one_and_no_other():
    table = TEXTS["docs/use.md"].split("| metric |")[1].split("\n\n")[0]
    assert {name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])} == {
        *MEANINGS
    }
