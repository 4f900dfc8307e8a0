"""Faults in the data: each is named with its file and line, and what is cut or left out is counted."""

import pytest
from small import ROW, TRAIN, write_rows

from deltaw.cli.app import run


def test_a_file_that_is_missing(here, said):
    assert "The data file cannot be read. where nothing.jsonl why No such file" in said("train", "nothing.jsonl")


def test_no_file_at_all(here, said):
    assert "There is no data to train on. remedy deltaw train FILE.jsonl" in said("train")


def test_a_file_that_is_a_folder(here, said):
    assert "The data file cannot be read. where base why Is a directory" in said("train", "base")


def test_a_row_that_is_no_json(here, said):
    write_rows(here / "rows.jsonl", *[ROW] * 10, '{"messages": [}', ROW)
    text = said(*TRAIN)
    assert "This line is not JSON (column 15). where rows.jsonl:11 why Expecting value." in text
    assert "remedy Each line is one JSON object, whole." in text


def test_a_file_without_rows(here, said):
    write_rows(here / "rows.jsonl", "", "")
    assert 'The data file has no rows. where rows.jsonl remedy A row looks like {"messages"' in said(*TRAIN)


def test_a_turn_without_text(here, said):
    write_rows(here / "rows.jsonl", ROW, {"messages": [{"role": "user", "content": None}]})
    assert "Turn 1 (user) has no text: its content is null. where rows.jsonl:2" in said(*TRAIN)


def test_a_row_of_another_shape(here, said):
    write_rows(here / "rows.jsonl", ROW, ROW, {"question": "a", "reply": "b"})
    text = said(*TRAIN)
    assert "question and answer, text (it has: question, reply)." in text
    assert "where rows.jsonl:3" in text


def test_a_fault_in_the_validation_file(here, said):
    write_rows(here / "val.jsonl", ROW, "[]")
    assert "This row is not a JSON object. where val.jsonl:2" in said(*TRAIN, "--val", "val.jsonl")


@pytest.mark.parametrize("share", ["1", "1.5", "-0.1", "nan"])
def test_a_validation_share_out_of_range(here, said, share):
    text = said(*TRAIN, f"--val={share}")
    assert f"val = {share}: a share is at least 0 and less than 1. remedy Give a share, or a file." in text


def test_rows_with_nothing_to_learn(here, said):
    write_rows(here / "rows.jsonl", *[{"messages": ROW["messages"][:1]}] * 3)
    text = said(*TRAIN)
    assert "No row has a token to learn. where rows.jsonl:1" in text
    assert "remedy Rows need an assistant's answer, or take --train-on all." in text


def test_more_tokens_than_the_model_sees(here, said):
    text = said(*TRAIN, "--max-tokens", "600")
    assert "max_tokens is 600, but this model sees only 512 tokens. remedy Take --max-tokens 512." in text


def test_rows_too_long_are_cut_and_counted(here, capsys):
    long = {"prompt": "say much", "completion": "b" * 300}
    write_rows(here / "rows.jsonl", *[ROW] * 4, long, long)
    assert run([*TRAIN, "--max-tokens", "64", "--steps", "1", "--val", "0"]) == 0
    assert "- 2 rows cut to 64 tokens (the first: rows.jsonl:5)" in capsys.readouterr().out


def test_rows_of_which_no_answer_is_left_are_left_out_and_counted(here, capsys):
    write_rows(here / "rows.jsonl", *[ROW] * 4, {"prompt": "w" * 100, "completion": "b"})
    assert run([*TRAIN, "--max-tokens", "64", "--steps", "1", "--val", "0"]) == 0
    out = capsys.readouterr().out
    assert "- 1 row left out: nothing to learn in their first 64 tokens (the first: rows.jsonl:5)" in out
