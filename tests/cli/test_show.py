"""How results look on a terminal and in a pipe, how a conversation is led there, and how a command ends early."""

import io
import json
import os
import signal

import pytest
from small import TRAIN, told

import deltaw
from deltaw.api.persona import Persona
from deltaw.cli import app as entry, chat
from deltaw.cli.app import run
from deltaw.cli.show import busy, facts, grid, json_line


@pytest.fixture
def terminal(monkeypatch):
    """A console that takes itself for a terminal of 60 columns."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "0")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")


def test_a_table_in_a_pipe_has_a_row_a_line_and_a_tab_between_cells(capsys):
    grid(["question", "base"], [["a\tb\nc", "[bold]x[/]"], ["y" * 200, "\x1b[31mred"]])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t") for line in lines] == [
        ["question", "base"],
        ["a b c", "[bold]x[/]"],
        ["y" * 200, "[31mred"],
    ]


def test_a_table_on_a_terminal_shows_cells_as_they_are(terminal, capsys):
    grid(["question", "base"], [["say [1]", "[bold]x[/]"]])
    out = capsys.readouterr().out
    assert "say [1]" in out
    assert "[bold]x[/]" in out
    assert "╭" in out


def test_facts_are_lines_in_a_pipe_a_table_on_a_terminal_and_json_when_asked(capsys, terminal, monkeypatch):
    facts("It", {"size": "3 GB"}, as_json=False)
    out = capsys.readouterr().out
    assert "It" in out.splitlines()[0]
    assert "size" in out
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    facts("It", {"size": "[3] GB"}, as_json=False)
    assert capsys.readouterr().out == "size: [3] GB\n"
    facts("It", {"size": "3 GB"}, as_json=True, record={"n_bytes": 3, "loss": float("nan")})
    assert json.loads(capsys.readouterr().out) == {"n_bytes": 3, "loss": None}


def test_json_has_no_words_that_json_does_not_know(capsys):
    json_line({"a": [float("inf"), {"b": float("nan")}], "c": "ß", "d": os.sep})
    assert capsys.readouterr().out == '{"a": [null, {"b": null}], "c": "ß", "d": "/"}\n'


def test_what_takes_long_is_said_beside_the_results_or_not_at_all(capsys):
    with busy() as say:
        say("Fetching")
    assert capsys.readouterr() == ("", "Fetching\n")
    with busy(quiet=True) as say:
        say("Fetching")
    assert capsys.readouterr() == ("", "")


def test_a_conversation_on_a_terminal_asks_until_its_end(here, tiny_path, monkeypatch, capsys, terminal):
    rows = here / "rows.jsonl"
    deltaw.finetune(rows, listen=[], **told(tiny_path, here, method="full", epochs=20, val="0"))
    asked, lines = [], iter(["say 1", KeyboardInterrupt, "", EOFError])

    def typed(prompt):
        asked.append(prompt)
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(
        chat, "sys", type("sys", (), {"stdin": type("stdin", (), {"isatty": staticmethod(lambda: True)})})
    )
    assert run(["chat", "run", "--max-new-tokens", "5", "--temperature", "0"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "/help lists what you can do." in out
    assert "bbb" in out
    assert "/quit or Ctrl-D leaves." in out
    assert asked == ["\nrun> "] * 4


def test_ctrl_c_ends_an_answer_twice_drops_it_and_the_conversation_goes_on(here, tiny_path, monkeypatch, capsys):
    deltaw.finetune(here / "rows.jsonl", listen=[], **told(tiny_path, here, steps=1))
    presses, lines = iter([1, 2, 1]), iter(["first", "second", "/compare third", "/save talk.jsonl", EOFError])

    def stream(persona, turns, sampling, heard):
        yield turns[-1]["content"]
        for _ in range(next(presses, 0)):
            signal.raise_signal(signal.SIGINT)
        if heard():
            yield " to the end"
        return True

    def typed(prompt):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(Persona, "stream", stream)
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(
        chat, "sys", type("sys", (), {"stdin": type("stdin", (), {"isatty": staticmethod(lambda: True)})})
    )
    assert run(["chat", "run"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[:4] == ["first", "second", "Stopped.", "base"]
    assert "to the end" not in out
    said = json.loads((here / "talk.jsonl").read_text())["messages"]
    assert [turn["content"] for turn in said] == ["first"] * 2 + ["second"] * 2


def test_ctrl_c_in_a_pipe_ends_the_conversation(here, tiny_path, monkeypatch):
    deltaw.finetune(here / "rows.jsonl", listen=[], **told(tiny_path, here, steps=1))

    def stream(persona, turns, sampling, heard):
        signal.raise_signal(signal.SIGINT)
        yield "one"
        return True

    monkeypatch.setattr(Persona, "stream", stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("say 1\nsay 2\n"))
    assert run(["chat", "run"]) == 130


def test_switching_in_the_midst_says_that_what_was_said_is_seen(here, tiny_path, monkeypatch, capsys):
    deltaw.finetune(here / "rows.jsonl", listen=[], **told(tiny_path, here, method="full", epochs=20, val="0"))
    lines = ["/system Be short.", "/base", "/persona run", "/reset", "say 1", "/base", "/persona run", "/persona"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert run(["chat", "run", "--temperature", "0"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1:3] == ["base answers now.", "run answers now."]
    seen = "It sees the conversation so far; /reset begins anew."
    assert out[4:] == ["bbb", f"base answers now. {seen}", f"run answers now. {seen}", "  base", "* run"]


def test_a_run_goes_on_with_its_own_settings_and_others_are_refused(here, said, capsys):
    text = said("train", "mine", "--resume", "--epochs", "9")
    assert "A run goes on with the settings it was begun with. remedy Leave --epochs out, or train anew." in text
    assert "Leave --rank out" in said("train", "mine", "--resume", "--rank", "9")
    assert "There is no run yet. where elsewhere" in said("train", "--resume", "--runs", "elsewhere")
    assert "Only one run is resumed at a time." in said("train", "mine", "yours", "--resume")


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (BrokenPipeError, 141)])
def test_a_command_that_is_cut_off_says_nothing_and_has_its_own_exit_code(here, monkeypatch, capfd, error, code):
    def cut(*_):
        raise error

    def application(arguments):
        return lambda *a, **k: cut()

    monkeypatch.setattr(entry, "application", application)
    before = os.dup(1)
    try:
        assert run([*TRAIN]) == code
    finally:
        os.dup2(before, 1)
        os.close(before)
    assert "Traceback" not in capfd.readouterr().err


def test_brackets_in_a_table_are_text(terminal, capsys):
    facts("[/b]", {"[red]name": "[/INST] br[bold]/x"}, as_json=False)
    out = capsys.readouterr().out
    for said in ("[/b]", "[red]name", "[/INST] br[bold]/x"):
        assert said in out
