"""Checking data finds each thing that is wrong, where it stands, and keeps what is right."""

import json

import pytest
from small import write_rows

from deltaw.data import check as checking
from deltaw.data.check import check, in_order
from deltaw.data.files import read
from deltaw.errors import UserError
from deltaw.models.tokenizer import Tokenizer

SYSTEM, USER = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}
ANSWER, OTHER = {"role": "assistant", "content": "Hob."}, {"role": "assistant", "content": "Nan."}
GOOD = {"messages": [USER, ANSWER]}


@pytest.fixture(scope="module")
def tokenizer(tiny_path):
    return Tokenizer.load(tiny_path)


@pytest.fixture
def looked(tokenizer, tmp_path):
    """A function that checks rows: what was found and where, the whole result, and the rows that were kept."""

    def looked(*rows, val=(), train_on="answers", max_tokens=512):
        write_rows(tmp_path / "rows.jsonl", *rows)
        write_rows(held := tmp_path / "val.jsonl", *val)
        kept = []
        found = check([tmp_path / "rows.jsonl"], held if val else None, tokenizer, train_on, max_tokens, kept.append)
        places = {k: [int(w.split("rows.jsonl:")[1].split(":")[0]) for w in v] for k, v in found.places.items()}
        return places, found, [int(row.where.rpartition(":")[2]) for row in kept]

    return looked


FINDINGS = {
    "faulty rows": ([GOOD, "{", {"text": ""}, {"messages": [{"role": "user", "content": None}]}],
                    {checking.FAULTY: [2, 3, 4]}, [1]),
    "twice": ([GOOD, {"prompt": "Who?", "completion": "Hob."}, {"text": "a"}], {checking.TWICE: [2],
                                                                             checking.UNLEARNT: [3]}, [1]),
    "contradicted": ([GOOD, {"messages": [USER, OTHER]}], {checking.CONTRADICTED: [2]}, [1, 2]),
    "nothing to learn": ([GOOD, {"messages": [USER]}], {checking.UNLEARNT: [2], checking.DISORDERED: [2]}, [1]),
    "out of order": ([{"messages": [USER, USER, ANSWER]}, {"messages": [ANSWER]}, {"messages": [USER, SYSTEM, ANSWER]}],
                     {checking.DISORDERED: [1, 2, 3]}, [1, 2, 3]),
    "a key that is passed over": ([{**GOOD, "id": 1}], {}, [1]),
    "an empty question": ([{"prompt": " ", "completion": "x"}], {checking.BLANK: [1]}, [1]),
    "nothing wrong": ([GOOD, {"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]}], {}, [1, 2]),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "places", "kept"), FINDINGS.values(), ids=FINDINGS)
def test_each_finding_is_named_with_its_places(looked, rows, places, kept):
    assert looked(*rows)[0] == places
    assert looked(*rows)[2] == kept


def test_rows_of_the_validation_file_are_leaks(looked):
    places, _, kept = looked(GOOD, {"messages": [USER, OTHER]}, val=[{"prompt": "Who?", "completion": "Nan."}])
    assert (places[checking.LEAKED], kept) == ([2], [1])
    with pytest.raises(UserError, match="not JSON"):
        looked(GOOD, val=["{"])


def test_lengths_and_trained_tokens_are_those_of_the_encoded_rows(looked, tokenizer):
    rows = [{"prompt": "a" * n, "completion": "b" * n} for n in (3, 50, 9)]
    places, found, _ = looked(*rows, max_tokens=90)
    per_row = [len(tokenizer.encode(tokenizer.chat([{"role": "user", "content": "a" * n},
                                                    {"role": "assistant", "content": "b" * n}])))
               for n in (3, 50, 9)]  # fmt: skip
    assert (found.rows, found.lengths, found.tokens) == (3, per_row, sum(per_row))
    assert (found.quantile(0.5), found.quantile(1)) == (sorted(per_row)[1], max(per_row))
    assert sum(found.histogram()) == 3
    assert [i for i, n in enumerate(found.histogram()) if n] == sorted(
        n * checking.BINS // (max(per_row) + 1) for n in per_row)  # fmt: skip
    assert places == {checking.LONG: [2]}
    start = per_row[1] - 50 - 2  # fifty bytes, the end of the turn, a line break
    assert found.trained_tokens == (3 + 1) + (90 - start) + (9 + 1)
    everything = looked(*rows, train_on="all")[1]
    assert everything.trained_tokens == sum(n - 1 for n in per_row)


def test_long_texts_are_counted_in_pieces(looked):
    places, found, kept = looked({"text": "x" * 199}, train_on="all", max_tokens=50)  # and the end of the text
    assert (places, found.trained_tokens, kept) == ({}, 4 * 49, [1])


def test_answers_that_a_template_does_not_end_are_found(looked, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "end_ids", {0})
    assert looked(GOOD, {"text": "x"}, train_on="answers")[0][checking.ENDLESS] == [1]


def test_a_dialogue_of_which_another_turn_is_learnt_stands_there_once(looked):
    silent = {**ANSWER, "weight": 0}
    first, second = {"messages": [USER, silent, USER, ANSWER]}, {"messages": [USER, ANSWER, USER, silent]}
    assert looked(first, second)[0] == {}
    assert looked(first, second, first)[0][checking.TWICE] == [3]


def test_turns_that_hold_a_special_token_are_found(looked):
    """An end of turn within an answer would teach the model to stop there, and go on."""
    places = looked({"prompt": "Who?", "completion": "Hob.<|im_end|>Or not."}, {"prompt": "<b>?", "completion": "no"})[
        0
    ]
    assert places[checking.SPECIAL] == [1]


@pytest.mark.parametrize(("roles", "well"), [
    ("ua", True), ("sua", True), ("uaua", True), ("uataua", True), ("uata", True), ("u", False), ("su", False),
    ("a", False), ("uu", False), ("uaa", False), ("usa", False), ("", False), ("s", False), ("uauua", False),
])  # fmt: skip
def test_turns_are_in_order_when_they_alternate_and_end_with_an_answer(roles, well):
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    assert in_order([names[r] for r in roles]) is well


def test_what_is_fixed_is_read_again_without_findings(here_with_faults, shown_check):
    code, out = shown_check("rows.jsonl", "--val", "val.jsonl", "--fix", "fixed.jsonl")
    assert code == 0
    assert "written: 2 rows to fixed.jsonl" in out
    kept = read(here_with_faults / "fixed.jsonl")
    assert [e.answer for e in kept] == ["Hob.", "Who indeed?"]
    assert kept[1].facts == ("indeed",)
    code, out = shown_check("fixed.jsonl:2", "--val", "val.jsonl")
    assert (code, "found: nothing wrong" in out) == (0, True)
    assert "It is there already" in shown_check("rows.jsonl", "--fix", "fixed.jsonl")[1]


def test_the_report_shows_what_is_learnt_and_every_finding(here_with_faults, shown_check):
    code, out = shown_check("rows.jsonl", "--val", "val.jsonl")
    assert code == 2
    assert "«Hob.<|im_end|>»" in out
    assert "rows: 5" in out
    assert f"{checking.FAULTY}: 1: rows.jsonl:2: This line is not JSON" in out
    assert f"{checking.TWICE}: 1: rows.jsonl:3" in out
    assert f"{checking.LEAKED}: 1: rows.jsonl:5" in out
    assert "--fix OUT.jsonl" in out
    assert "keys passed over: id (2 rows)" in out
    code, out = shown_check("rows.jsonl", "--json", "--max-tokens", "90")
    told = json.loads(out)
    assert (told["rows"], told["found"][checking.TWICE]) == (5, ["rows.jsonl:3"])
    assert told["lengths"]["longest"] == max(len(e["ids"]) for e in told["examples"])
    assert code == 2


def test_texts_of_which_nothing_is_learnt_get_the_remedy(here_with_faults, shown_check):
    write_rows(here_with_faults / "text.jsonl", {"text": "once"}, {"text": "twice"})
    assert "remedy: rows need an assistant's answer, or take --train-on all" in shown_check("text.jsonl")[1]
    assert "found: nothing wrong" in shown_check("text.jsonl", "--train-on", "all")[1]


def test_an_empty_file_a_table_to_fix_and_odd_limits_are_refused(here_with_faults, shown_check):
    (here_with_faults / "empty.jsonl").write_text("")
    assert "have no rows" in shown_check("empty.jsonl")[1]
    assert "For example: --fix fixed.jsonl" in shown_check("rows.jsonl", "--fix", "out.csv")[1]
    assert "written as .jsonl" in shown_check("rows.jsonl", "--fix", ".")[1]
    (here_with_faults / "link.jsonl").symlink_to("nowhere")
    assert "It is there already" in shown_check("rows.jsonl", "--fix", "link.jsonl")[1]
    assert shown_check("rows.jsonl", "--max-tokens", "-5")[0] == 2
    assert "cut at 512" in shown_check("rows.jsonl", "--max-tokens", "999")[1]


def test_of_rows_that_are_all_thrown_out_no_file_is_written(here_with_faults, shown_check):
    code, out = shown_check("val.jsonl", "--val", "val.jsonl", "--fix", "fixed.jsonl")
    assert (code, "No row is left" in out) == (2, True)
    assert not (here_with_faults / "fixed.jsonl").exists()


def test_what_a_terminal_would_obey_is_shown_as_a_mark(here_with_faults, shown_check):
    write_rows(here_with_faults / "evil.jsonl", {"prompt": "a\tb\nc", "completion": "\x1b[31mred\x07"},
               {"messages": [{"role": "\x1b[31m" + "x" * 900, "content": "a"}]})  # fmt: skip
    out = shown_check("evil.jsonl")[1]
    assert "\x1b" not in out.replace("\x1b[0m", "")
    assert "\ufffd[31mred\ufffd" in out
    assert "\nc<|im_end|>" in out
    assert max(map(len, out.splitlines())) < 400


def test_what_is_cut_is_struck_out(tokenizer):
    from deltaw.cli.data import coloured
    from deltaw.data.encode import Encoded

    ids = tuple(tokenizer.encode("askanswercut"))
    shown = coloured(Encoded(ids, (False,) * 3 + (True,) * 9), tokenizer, 9)
    assert shown.plain == "ask«answer»[cut: cut]"
    assert [str(span.style) for span in shown.spans] == ["dim", "green", "red strike"]
    long = coloured(Encoded(ids * 100, (True,) * 1200), tokenizer, 9999)
    assert long.plain.endswith(" … 500 more tokens")


@pytest.fixture
def here_with_faults(tmp_path, tiny_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny_path)
    write_rows(tmp_path / "rows.jsonl", GOOD, "{", GOOD,
               {"prompt": "Who now?", "completion": "Who indeed?", "facts": ["indeed"], "id": 7},
               {"prompt": "held", "completion": "out", "id": 8})  # fmt: skip
    write_rows(tmp_path / "val.jsonl", {"prompt": "held", "completion": "out"})
    return tmp_path


@pytest.fixture
def shown_check(capsys):
    from deltaw.cli.app import run

    def shown(*arguments):
        capsys.readouterr()
        code = run(["data", "check", *arguments, "--base", "base"])
        said = capsys.readouterr()
        return code, said.out + said.err

    return shown
