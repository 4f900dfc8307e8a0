"""Parquet files and data sets of the hub, by `datasets` itself: the same rows as from a file of lines."""

import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from small import ROW, TRAIN, write_rows

from deltaw.api.finetune import called
from deltaw.cli.app import run
from deltaw.data import files
from deltaw.data.files import read
from deltaw.errors import UserError

ROWS = {
    "messages": [ROW, {"messages": [*ROW["messages"], *ROW["messages"]]}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Hob."}]}] * 2,
    "alpaca": [
        {"instruction": "Who?", "input": "", "output": "Hob."},
        {"instruction": "A", "input": "b", "output": "c"},
    ],
    "texts": [{"text": "one"}, {"text": "two"}],
    "two shapes": [{"text": "one"}, {"prompt": "a", "completion": "b"}],
}


def told(rows):
    return [(row.messages, row.text) for row in rows]


def write_parquet(path, rows):
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{key: row.get(key) for r in rows for key in r} for row in rows]), path
    )


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_a_parquet_files_rows_are_those_of_lines(rows, tmp_path):
    write_rows(tmp_path / "rows.jsonl", *rows)
    write_parquet(tmp_path / "rows.parquet", rows)
    got = read(tmp_path / "rows.parquet")
    assert told(got) == told(read(tmp_path / "rows.jsonl"))
    assert [row.where for row in got] == [f"{tmp_path / 'rows.parquet'}:{n}" for n in (1, 2)]


@pytest.fixture
def hub(tmp_path):
    """A data set as the hub has it: a folder with a file for each split."""
    folder = tmp_path / "owner" / "bees"
    folder.mkdir(parents=True)
    write_rows(folder / "train.jsonl", *ROWS["texts"])
    write_rows(folder / "test.jsonl", {"text": "three"})
    return folder


def test_a_data_set_of_the_hub_is_read_by_its_name_and_split(hub):
    assert [row.text for row in read_hub(f"hf:{hub}")] == ["one", "two"]
    (row,) = read_hub(f"hf:{hub}@test")
    assert (row.text, row.where) == ("three", f"hf:{hub}@test:1")


def read_hub(name):
    return read(Path(name))


@pytest.mark.parametrize(("name", "asked"), [
    ("hf:owner/bees", {"path": "owner/bees", "name": None, "split": "train"}),
    ("hf:owner/bees@validation[:10%]", {"path": "owner/bees", "name": None, "split": "validation[:10%]"}),
    ("hf:owner/bees/english@test", {"path": "owner/bees", "name": "english", "split": "test"}),
    ("hf:bees", {"path": "bees", "name": None, "split": "train"})])  # fmt: skip
def test_a_name_says_owner_configuration_and_split(name, asked):
    assert files._asked(name) == asked


def test_turns_that_are_stored_column_by_column_are_turns():
    """As `datasets` hands out what was declared a sequence of structs."""
    stored = {"from": ["human", "gpt"], "value": ["Who?", "Hob."]}
    assert files._turns(stored) == [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Hob."}]
    for other in ({"a": 1}, {"tags": ["a", "b"], "scores": [1]}, {}, None, 5, ["a"]):
        assert files._turns(other) == other


def test_columns_that_hold_no_texts_are_faults_of_their_rows(tmp_path):
    write_parquet(tmp_path / "rows.parquet", [{"prompt": b"a", "completion": b"b"}])
    with pytest.raises(UserError, match="has no text: its content is") as e:
        read(tmp_path / "rows.parquet")
    assert e.value.where == f"{tmp_path / 'rows.parquet'}:1"


def test_an_empty_table_has_no_rows(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="The data file has no rows"):
        read(tmp_path / "rows.parquet")


@pytest.mark.parametrize("name", ["../nowhere", "./nowhere/x", "/no/where", "", "/", "@", "owner/nothing"])
def test_a_folder_that_is_not_there_is_not_searched_for_elsewhere(name, tmp_path, monkeypatch):
    (tmp_path / "here" / "owner").mkdir(parents=True)
    write_rows(tmp_path / "train.jsonl", {"text": "another"})
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="This data set cannot be read"):
        read(Path(f"hf:{name}"))


def test_a_files_name_is_no_pattern(tmp_path):
    write_parquet(tmp_path / "rows[1].parquet", [{"text": "right"}])
    write_parquet(tmp_path / "rows1.parquet", [{"text": "wrong"}])
    assert [row.text for row in read(tmp_path / "rows[1].parquet")] == ["right"]


def test_a_fault_names_its_row(tmp_path):
    write_parquet(tmp_path / "rows.parquet", [{"text": "one"}, {"text": " "}])
    with pytest.raises(UserError, match="The text is empty") as e:
        read(tmp_path / "rows.parquet")
    assert e.value.where == f"{tmp_path / 'rows.parquet'}:2"


@pytest.mark.parametrize("name", ["nothing.parquet", "broken.parquet", "hf:no/where", "hf:owner@no"])
def test_what_cannot_be_read_is_said_in_a_panel(name, here, said):
    (here / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    (here / "owner").mkdir()
    write_rows(here / "owner" / "train.jsonl", {"text": "one"})
    assert "This data set cannot be read. where" in said("train", name, *TRAIN[2:])


def test_without_datasets_it_is_said_what_to_install(here, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "remedy pip install datasets" in said("train", "rows.parquet", *TRAIN[2:])


def test_a_run_trains_on_them_and_is_called_by_their_name(here, hub, capsys):
    write_parquet(here / "bees.parquet", [{"prompt": f"say {i}", "completion": "b"} for i in range(50)])
    assert run(["train", "bees.parquet", f"hf:{hub}:2", *TRAIN[2:], "--steps", "2", "--train-on", "all"]) == 0
    assert json.loads((here / "runs" / "bees-lora-1" / "manifest.json").read_text())["data"].keys() == {"bees.parquet"}
    assert called(Path("hf:owner/bees/english@test")) == "english"
    assert called(Path("hf:owner/bees")) == called(Path("hf:bees")) == "bees"
