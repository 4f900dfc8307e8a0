"""Rows are read as they were written, and of every fault it is said in which file and line it stands."""

import csv
import json
import tracemalloc
from contextlib import suppress
from itertools import islice

import pytest
from hypothesis import given, settings, strategies as st

from deltaw.data import jsons
from deltaw.data.files import read, split_weight, stream
from deltaw.data.rows import ROLES, Example
from deltaw.errors import UserError

USER, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Hob."}
GOOD = json.dumps({"messages": [USER, ANSWER]})


def turns(*messages):
    return json.dumps({"messages": list(messages)})


BAD = {
    "not JSON": ('{"messages": [}', r"not JSON \(column 15\)"),
    "cut short": (GOOD[:-3], "not JSON"),
    "two objects": (f"{GOOD} {GOOD}", r"not JSON \(column \d+\)\. Extra data"),
    "a list": ("[1, 2]", "not a JSON object"),
    "a text": ('"hello"', "not a JSON object"),
    "nothing": ("null", "not a JSON object"),
    "no known key": ('{"question": "a", "response": "b"}', r"none of the keys .*\(it has: question, response\)"),
    "no key": ("{}", r"it has: none"),
    "half a pair": ('{"prompt": "a"}', "it has: prompt"),
    "blank text": ('{"text": "  "}', "text"),
    "text that is none": ('{"text": 3}', "text"),
    "turns that are no list": ('{"messages": "hi"}', "not a list of turns"),
    "no turns": ('{"messages": []}', "not a list of turns"),
    "a turn that is a text": ('{"messages": ["hi"]}', "Turn 1 has the role None"),
    "an unknown role": (turns({"role": "human", "content": "x"}), "the role 'human'.*system, user, assistant, tool"),
    "a role that is a list": (turns({"role": ["user"], "content": "x"}), "Turn 1 has the role"),
    "null content": (turns(USER, {"role": "assistant", "content": None}), r"Turn 2 \(assistant\) has no text: .* null"),
    "no content": (turns({"role": "user"}), r"Turn 1 \(user\) has no text"),
    "content in parts": (turns({"role": "user", "content": [{"type": "text"}]}), r"Turn 1 \(user\) has no text"),
    "an empty answer": (turns(USER, {"role": "assistant", "content": ""}), "Turn 2 is an empty answer"),
    "a blank answer": (turns(USER, {"role": "assistant", "content": " \n"}), "Turn 2 is an empty answer"),
    "a null completion": ('{"prompt": "a", "completion": null}', r"Turn 2 \(assistant\) has no text"),
    "an empty completion": ('{"prompt": "a", "completion": ""}', "Turn 2 is an empty answer"),
    "references that are a text": ('{"prompt": "a", "completion": "b", "references": "b"}', "'references' is not a"),
    "facts that are numbers": ('{"prompt": "a", "completion": "b", "facts": [1]}', "'facts' is not a list of texts"),
    "half a character in a text": ('{"text": "x\\ud83d"}', "'text' holds half a character"),
    "half a character in a reference": ('{"text": "a", "references": ["\\udc00"]}', "'references' holds half"),
    "an input that is no text": ('{"instruction": "a", "input": ["x"], "output": "b"}', "'input' is no text"),
    "a system prompt that is no text": ('{"system": [1], "prompt": "a", "completion": "b"}', "'system' is no text"),
    "a system prompt of a text": ('{"system": "x", "text": "a"}', "A text has no system prompt"),
    "an empty text": ('{"text": " "}', "text is empty"),
    "half a character": ('{"prompt": "a", "completion": "x\\ud83d"}', "character|surrogate|UTF-8|Unicode"),
    "a key that stands twice": ('{"text": "a", "text": "b"}', "The key 'text' stands twice"),
    "a weight of a row": ('{"text": "a", "weight": 2}', "A weight of single rows is not read.*FILE:WEIGHT"),
    "a null text": ('{"text": null}', r"'text' is no text.*It is null\."),
    "Python's quotes": ("{'text': 'a'}", r"not JSON \(column 2\).*single quotes.*json\.dumps"),
    "a comma at the end": ('{"text": "a",}', "not JSON.*A comma stands before the end.*Leave the last comma out"),
    "a comment": ('// rows', "not JSON.*A comment begins there.*leave them out"),
    "nesting without end": ("[" * 100_000, "nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "said"), BAD.values(), ids=BAD)
def test_a_bad_row_is_refused_with_its_file_and_line(line, said, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{GOOD}\n\n{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(UserError, match=said) as e:
        read(file)
    assert e.value.where == f"{file}:4"
    assert e.value.code == 2


@pytest.mark.parametrize("content", ["", "\n\n", "  \n"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt"])
def test_an_empty_file_is_refused(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="has no rows"):
        read(tmp_path / name)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
def test_a_file_that_is_not_utf8_is_refused_with_its_line(bom, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(bom + GOOD.encode() + b"\n" + b"\xe4" + GOOD.encode() + b"\n")
    with pytest.raises(UserError, match="not UTF-8") as e:
        read(file)
    assert e.value.where == f"{file}:2"


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UserError, match="cannot be read") as e:
            read(path)
        assert e.value.where == str(path)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_line_numbers_are_true_whatever_the_lines_hold_and_end_with(bom, ending, tmp_path):
    odd = json.dumps({"prompt": "a\u2028b\u2029c\x85d\x0be", "completion": "x\x0cy\x1cz"}, ensure_ascii=False)
    file = tmp_path / "rows.jsonl"
    file.write_text(bom + odd + ending + ending + GOOD + ending, encoding="utf-8", newline="")
    first, second = read(file)
    assert (first.where, second.where) == (f"{file}:1", f"{file}:3")
    assert "a\u2028b\u2029c\x85d" in first.messages[0]["content"]


text = st.text(max_size=20)
turn = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": text})
row = st.fixed_dictionaries(
    {"messages": st.lists(turn, min_size=1, max_size=4)},
    optional={"references": st.lists(text, max_size=2), "facts": st.lists(text, max_size=2), "id": st.integers()},
).filter(lambda row: all(t["content"].strip() or t["role"] != "assistant" for t in row["messages"]))


@settings(deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=5), ascii=st.booleans(), blank=st.integers(0, 2))
def test_what_was_written_is_what_is_read(rows, ascii, blank, tmp_path_factory):  # noqa: A002 (what json calls it)
    file = tmp_path_factory.getbasetemp() / "property.jsonl"
    written = [json.dumps(row, ensure_ascii=ascii) for row in rows]
    file.write_text(("\n" * (blank + 1)).join(written), encoding="utf-8")
    for i, (want, got) in enumerate(zip(rows, read(file), strict=True)):
        assert list(got.messages) == want["messages"]
        assert list(got.references) == want.get("references", [])
        assert list(got.facts) == want.get("facts", [])
        assert got.where == f"{file}:{1 + i * (blank + 1)}"


def test_a_pair_is_a_conversation_and_other_keys_are_left_alone(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "Who?", "completion": "Hob.", "source": 3}\n{"text": " Once.\\n", "facts": ["x"]}\n')
    pair, plain = read(file)
    assert pair == Example((USER, ANSWER), "", f"{file}:1", unread=("source",))
    assert plain == Example((), " Once.\n", f"{file}:2", (), ("x",))


def test_an_examples_prompt_and_answer_are_what_is_before_the_last_answer_and_itself():
    assert Example((USER, ANSWER)).prompt == (USER,)
    assert Example((USER, ANSWER)).answer == "Hob."
    assert Example((USER, ANSWER, USER)).prompt == (USER, ANSWER, USER)
    assert Example((USER, ANSWER, USER)).answer == Example((), "text").answer == ""


def is_divider(line):
    return line.strip() == "---"


body = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=8), max_size=4).map("\n".join)


@settings(deadline=None)
@given(bodies=st.lists(body.filter(lambda b: not any(map(is_divider, b.split("\n")))), min_size=1, max_size=4),
       divider=st.sampled_from(["---", " --- ", "---\t"]))  # fmt: skip
def test_documents_of_a_text_file_are_what_stands_between_its_dividers(bodies, divider, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "property.txt"
    content = f"\n{divider}\n".join(bodies)
    file.write_text(content, encoding="utf-8")
    wanted = [b.strip() for b in bodies if b.strip().removeprefix("\ufeff")]
    if not wanted:
        return
    examples = read(file)
    assert [e.text for e in examples] == [w.removeprefix("\ufeff") if i == 0 else w for i, w in enumerate(wanted)]
    for example in examples:
        line = int(example.where.rpartition(":")[2])
        assert content.split("\n")[line - 1].strip().removeprefix("\ufeff")
        assert example.text.split("\n")[0].strip() in content.split("\n")[line - 1]


@pytest.mark.parametrize(
    ("name", "file", "weight"),
    [("a", "a", 1), ("a.jsonl:2", "a.jsonl", 2), ("a:0.5", "a", 0.5), ("C:rows", "C:rows", 1), ("a:b:1e1", "a:b", 10)],
)
def test_a_number_after_the_last_colon_is_the_files_weight(name, file, weight):
    path, got = split_weight(name)
    assert (str(path), got) == (file, weight)


def test_a_file_whose_name_ends_like_a_weight_is_that_file(tmp_path):
    (tmp_path / "rows:2").write_text(GOOD)
    assert split_weight(str(tmp_path / "rows:2")) == (tmp_path / "rows:2", 1.0)


@pytest.mark.parametrize("weight", ["0", "-1", "inf", "nan", "1e999"])
def test_a_weight_that_is_not_positive_is_refused(weight):
    with pytest.raises(UserError, match=f"weight {weight} is not between 0.001 and 1000"):
        split_weight(f"rows.jsonl:{weight}")


CONVERSATION = [{"role": "system", "content": "Be kind."}, USER, ANSWER]
SHAPED = {
    "messages": {"messages": CONVERSATION},
    "sharegpt": {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Who?"},
                                   {"from": "gpt", "value": "Hob."}]},
    "sharegpt with our names": {"conversations": CONVERSATION},
    "sharegpt and a system key": {"system": "Be kind.", "conversations": [{"from": "user", "value": "Who?"},
                                                                          {"from": "assistant", "value": "Hob."}]},
    "a pair and a system key": {"system": "Be kind.", "prompt": "Who?", "completion": "Hob."},
    "a pair of lists": {"prompt": CONVERSATION[:2], "completion": CONVERSATION[2:]},
    "a question and its answer": {"question": "Who?", "answer": "Hob.", "system": "Be kind."},
    "alpaca": {"instruction": "Who?", "input": "", "output": "Hob.", "system": "Be kind."},
}  # fmt: skip


@pytest.mark.parametrize("row", SHAPED.values(), ids=SHAPED)
def test_every_shape_of_a_row_is_the_same_conversation(row, tmp_path):
    for name, content in (("rows.jsonl", json.dumps(row)), ("rows.json", json.dumps([row], indent=2)),
                          ("other.json", json.dumps(row))):  # fmt: skip
        (tmp_path / name).write_text(content)
        (got,) = read(tmp_path / name)
        assert list(got.messages) == CONVERSATION, name


def test_an_alpacas_input_follows_its_instruction(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Translate.", "input": "Hund", "output": "dog"}')
    (got,) = read(tmp_path / "rows.jsonl")
    assert (got.messages[0]["content"], got.answer) == ("Translate.\n\nHund", "dog")


@pytest.mark.parametrize("asked", ['[{"role": "user", "content": "a"}]', ' [ {"content":"a", "role":"user"}]'])
def test_a_table_may_have_lists_of_messages(asked, tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as f:
        csv.writer(f).writerows([["prompt", "completion"], [asked, '[{"role": "assistant", "content": "b"}]']])
    (row,) = read(tmp_path / "rows.csv")
    assert row.messages == ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def test_a_table_may_have_a_history(tmp_path):
    (tmp_path / "rows.csv").write_text('instruction,output,history\nA,b,"[[""c"", ""d""]]"\nE,f,[]\nG,h,\n')
    first, second, third = read(tmp_path / "rows.csv")
    assert [turn["content"] for turn in first.messages] == ["c", "d", "A", "b"]
    assert (len(second.messages), len(third.messages)) == (2, 2)


def test_a_fault_near_the_beginning_of_a_list_is_told_before_the_rest_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(jsons, "PIECE", 100)
    (tmp_path / "rows.json").write_text('[{"text": "a"},\n{"text": b},\n' + '{"text": "c"},\n' * 9999 + "]")
    chunks = []
    real = jsons.pieces
    monkeypatch.setattr(jsons, "pieces", lambda path: (chunks.append(1) or chunk for chunk in real(path)))
    with pytest.raises(UserError) as e:
        read(tmp_path / "rows.json")
    assert e.value.where.endswith(":2")
    assert len(chunks) < 4


@settings(deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=30).filter(str.strip), min_size=1, max_size=6),
       chunk=st.integers(1, 40), ascii=st.booleans())  # fmt: skip
def test_a_list_is_read_the_same_whatever_is_read_at_once(texts, chunk, ascii, tmp_path_factory):  # noqa: A002 (json calls it so)
    file = tmp_path_factory.getbasetemp() / "chunks.json"
    file.write_text(json.dumps([{"text": text} for text in texts], ensure_ascii=ascii, indent=1), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsons, "PIECE", chunk)
        patch.setattr(jsons, "PIECE", chunk)
        got = read(file)
    assert [row.text for row in got] == texts
    assert [row.where for row in got] == [f"{file}:{2 + 3 * i}" for i in range(len(texts))]


def test_an_alpacas_history_comes_before_its_instruction(tmp_path):
    row = {"instruction": "And now?", "output": "Two.", "history": [["Before?", "One."], ["Then?", "Some."]]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (got,) = read(tmp_path / "rows.jsonl")
    assert [turn["content"] for turn in got.messages] == ["Before?", "One.", "Then?", "Some.", "And now?", "Two."]
    assert [turn["role"] for turn in got.messages] == ["user", "assistant"] * 3


@pytest.mark.parametrize("row", [
    {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]},
    {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Hob.", "weight": 0},
                       {"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Hob."}]}])  # fmt: skip
def test_a_turn_of_weight_nought_is_silent(row, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (got,) = read(tmp_path / "rows.jsonl")
    assert (list(got.messages), got.silent) == ([USER, ANSWER] * 2, (1,))


cell = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\r\0"), min_size=1, max_size=9
)
cells = st.lists(st.tuples(cell, cell.filter(str.strip)), min_size=1, max_size=5)


@settings(deadline=None)
@given(rows=cells, suffix=st.sampled_from(["csv", "tsv"]))
def test_a_table_is_read_as_it_was_written_with_the_lines_on_which_rows_begin(rows, suffix, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / f"property.{suffix}"
    begun, at = [], 2
    with file.open("w", newline="", encoding="utf-8") as f:
        table = csv.writer(f, delimiter="," if suffix == "csv" else "\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
        table.writerow(["prompt", "completion"])
        for row in rows:
            table.writerow(row)
            begun.append(at)
            at += 1 + "".join(row).count("\n")
    got = read(file)
    assert [(e.messages[0]["content"], e.answer) for e in got] == rows
    assert [e.where for e in got] == [f"{file}:{n}" for n in begun]


@settings(deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=4), indent=st.sampled_from([None, 0, 2]))
def test_a_list_is_read_as_it_was_written_with_the_lines_on_which_rows_begin(rows, indent, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "property.json"
    content = json.dumps(rows, indent=indent)
    file.write_text(content)
    got = read(file)
    assert [list(e.messages) for e in got] == [r["messages"] for r in rows]
    for example in got:
        line = content.split("\n")[int(example.where.rpartition(":")[2]) - 1]
        assert line.lstrip(" [").startswith("{") or indent is None


BROKEN = {
    "a short row": ("rows.csv", "prompt,completion\na,b\nc\n", "has 1 cell in 2 columns", 3),
    "an open quote": ("rows.csv", 'prompt,completion\na,b\n"c,d\n', "no table of quoted cells", 3),
    "unknown columns": ("rows.tsv", "question\treply\na\tb\n", "none of the keys .*it has: question, reply", 2),
    "an empty answer": ("rows.csv", "prompt,completion\n\na,\n", "Turn 2 is an empty answer", 3),
    "references that are a text": ("rows.csv", "text,references\na,b\n", "'references' is not a list", 2),
    "a list that is cut short": ("rows.json", '[\n{"text": "a"},\n{"text": ', "not a JSON list of rows", 3),
    "a list that never ends": ("rows.json", '[{"text": "a"}\n', "not a JSON list of rows", 2),
    "something after a list": ("rows.json", '[{"text": "a"}]\n[{"text": "b"}]', "Something follows the list", 2),
    "a fault among rows": ("rows.json", '[\n{"text": "a"},\n{"text": b},\n{"text": "c"},\n{"text": "d"}]', "list", 3),
    "a comma that is missing": ("rows.json", '[{"text": "a"}\n{"text": "b"}]', "not a JSON list of rows", 2),
    "a comma too many": ("rows.json", '[{"text": "a"},\n\n]', "not a JSON list of rows", 3),
    "a list cut in a text": ("rows.json", '[\n{"text": "a"},\n{"text": "b', "in the midst.*was cut off", 3),
    "a comma before the end": ("rows.json", '[{"text": "a"},\n\n]', "comma stands before the end.*last comma out", 3),
    "a comma before a brace": ("rows.json", '[{"text": "a",}]', "comma stands before the end.*last comma out", 1),
    "a comment in a list": ("rows.json", '[\n// one\n{"text": "a"}]', "A comment begins there.*leave them out", 2),
    "a comment behind a row": ("rows.json", '[{"text": "a"} # one\n]', "A comment begins there.*leave them out", 1),
    "Python's quotes in a list": ("rows.json", "[{'text': 'a'}]", r"single quotes.*json\.dumps", 1),
    "a key twice in a list": ("rows.json", '[{"text": "a"},\n{"text": "a", "text": "b"}]', "'text' stands twice", 2),
    "rows within an object": ("rows.json", '{"data": [\n{"text": "a"}]}', "in 'data' of one object.*jq -c ", None),
    "objects over several lines": ("rows.jsonl", '{\n"text": "a"\n}', "several lines.*one row a line.*jq -c", None),
    "a history of no pairs": ("rows.json", '[\n{"instruction": "a", "output": "b", "history": [5]}]', "of pairs", 2),
    "a history of objects": ("rows.json", '[{"instruction": "a", "output": "b", "history": [{"a": 1}]}]', "pairs", 1),
    "a history of texts": ("rows.json", '[{"instruction": "a", "output": "b", "history": ["ab"]}]', "of pairs", 1),
    "a weight between": ("rows.json", '[{"messages": [{"role": "user", "content": "a", "weight": 0.5}]}]', "0.5", 1),
    "an object that begins on its line": ("rows.jsonl", '{"text":\n"a"}', "over several lines.*jq -c", None),
    "rows within an object, further in": ("rows.json", '{"v": 1,\n"data": [{"text": "a"}]}', "in 'data' of one", None),
    "splits within an object": ("rows.json", '{"a": [{"text": "a"}], "b": [{"text": "a"}]}', "in 'a', 'b' of", None),
    "a later object over several lines": ("rows.jsonl", '{"text": "a"}\n{"text":\n"b"}', "on where it must not", 2),
    "a tab in a text": ("rows.jsonl", '{"text": "a\tb"}', "A tab or a line break stands in a text", 1),
    "preferences": ("rows.jsonl", '{"chosen": [{"role": "user"}], "rejected": []}', "has: chosen, rejected", 1),
    "a row of empty cells": ("rows.csv", "prompt,completion\n\na,b\n,\n", "This row is empty", 4),
    "two columns of a name": ("rows.csv", "text,text\na,b\n", "Two columns are called 'text'", 1),
    "a list of numbers": ("rows.json", "[\n1]", "not a JSON object", 2),
    "a bad row of a list": ("rows.json", '[{"text": "a"},\n\n{"txet": "b"}]', "it has: txet", 3),
    "UTF-16": ("rows.csv", "prompt,completion\na,b\n".encode("utf-16"), "not UTF-8 text.*UTF-16", 1),
    "Latin-1 in a list": ("rows.json", '[{"text":"a"},\n{"text":"ä"}]'.encode("latin-1"), "not UTF-8", 2),
    "gzip": ("rows.jsonl", b"\x1f\x8b\x08\x00\x80\x81", "not UTF-8 text.*compressed by gzip.*as plain UTF-8", 1),
    "Latin-1": ("rows.csv", "prompt,completion\na,ä\n".encode("latin-1"), "not UTF-8 text.*Latin-1", 2),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "said", "line"), BROKEN.values(), ids=BROKEN)
def test_a_fault_in_a_list_or_a_table_is_named_with_its_line(name, content, said, line, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"(?s){said}") as e:
        read(tmp_path / name)
    assert e.value.where == f"{tmp_path / name}" + (f":{line}" if line else "")


def test_a_list_is_a_list_whatever_its_file_is_called(tmp_path):
    for name in ("rows.jsonl", "rows", "rows.json"):
        (tmp_path / name).write_text('\ufeff \n[{"text": "a"},\n {"text": "b"}]', encoding="utf-8")
        assert [(row.text, row.where) for row in read(tmp_path / name)] == [
            ("a", f"{tmp_path / name}:2"), ("b", f"{tmp_path / name}:3")]  # fmt: skip


@pytest.mark.parametrize("row", [
    {"tools": [{"type": "function"}], "messages": [USER, ANSWER]}, {"completion": [ANSWER], "prompt": [USER]},
    {"references": [], "question": "Who?", "answer": "Hob."},
    {"history": [], "instruction": "Who?", "output": "Hob."}])  # fmt: skip
def test_a_row_that_begins_with_a_list_is_a_row(row, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert read(tmp_path / "rows.jsonl")[0].messages == (USER, ANSWER)


def test_tables_as_other_programs_write_them(tmp_path):
    """pandas' index has no name; an answer may be JSON; a weight is a text; shapes may be mixed."""
    (tmp_path / "rows.csv").write_text(',prompt,completion,weight,messages\n0,q,"[{""role"": ""admin""}]",1,\n1,,,,"'
                                       + json.dumps([USER, ANSWER]).replace('"', '""') + '"\n')  # fmt: skip
    (tmp_path / "odd.csv").write_text('text\n"[{""role"": ""user"", ""content"": ""a""}, 5]"\n')
    assert read(tmp_path / "odd.csv")[0].text == '[{"role": "user", "content": "a"}, 5]'
    one, two = read(tmp_path / "rows.csv")
    assert (one.answer, one.unread) == ('[{"role": "admin"}]', ("column 1",))
    assert two.messages == (USER, ANSWER)


def test_documents_may_end_their_lines_as_old_programs_do(tmp_path):
    (tmp_path / "rows.txt").write_bytes(b"aaa\r---\rbbb\rccc\r")
    assert [(row.text, row.where[-2:]) for row in read(tmp_path / "rows.txt")] == [("aaa", ":1"), ("bbb\rccc", ":3")]


def test_a_table_may_end_its_lines_as_old_programs_do(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b'prompt,completion\ra,"b\rc"\rd,e\r')
    assert [(row.answer, row.where[-2:]) for row in read(tmp_path / "rows.csv")] == [("b\rc", ":2"), ("e", ":4")]


def test_columns_that_are_null_are_not_there(tmp_path):
    write = (tmp_path / "rows.jsonl").write_text
    write('{"messages": null, "prompt": null, "completion": null, "text": "a", "references": null, "weight": null}')
    assert read(tmp_path / "rows.jsonl")[0].text == "a"
    write('{"text": null, "prompt": "Who?", "completion": "Hob.", "system": null}')
    assert read(tmp_path / "rows.jsonl")[0].messages == (USER, ANSWER)


def test_keys_that_are_passed_over_are_known(tmp_path):
    rows = [{"messages": [{**USER, "name": "x"}, {**ANSWER, "tool_calls": []}], "id": 1, "text": "a", "facts": []},
            {"instruction": "a", "output": "b", "input": "", "history": [], "score": 2},
            {"prompt": "a", "completion": "b", "system": "c", "none": None}, {"text": "a", "weight": 1}]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert [row.unread for row in read(tmp_path / "rows.json")] == [
        ("id", "text", "messages.name", "messages.tool_calls"), ("score",), (), ()]  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode), suffix=st.sampled_from(
    ["jsonl", "json", "csv", "tsv", "txt"]))  # fmt: skip
def test_no_content_of_a_file_ends_in_anything_but_rows_or_a_refusal(content, suffix, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / f"fuzz.{suffix}"
    file.write_bytes(content)
    with suppress(UserError):
        assert all(isinstance(e, Example) for e in read(file))


@pytest.mark.parametrize(
    ("name", "begin", "between", "end"), [("rows.jsonl", "", "\n", ""), ("rows.json", "[", ",", "]")]
)
def test_rows_are_read_one_after_another_in_constant_memory(name, begin, between, end, tmp_path, monkeypatch):
    """Of a file of 30 MB less than 3 are ever held, be it a list without line breaks."""
    monkeypatch.setattr(jsons, "PIECE", 1 << 17)
    monkeypatch.setattr(jsons, "PIECE", 1 << 17)
    file = tmp_path / name
    with file.open("w") as f:
        for i in range(30_000):
            f.write((between if i else begin) + json.dumps({"prompt": f"{i}", "completion": "b" * 1000}))
        f.write(end)
    tracemalloc.start()
    assert [int(row.prompt[0]["content"]) for row in islice(stream(file), 29_990, None)] == [*range(29_990, 30_000)]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 3_000_000
