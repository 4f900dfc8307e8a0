"""One base, many personas: loaded once, switched by pointer writes; and a conversation that can be trained on."""

import json

import pytest
import torch
from oracles import our_logits
from small import told

import deltaw
from deltaw.api import persona as api
from deltaw.api.chat import Chat
from deltaw.api.persona import Persona, addressed, load, load_all, load_base, locate
from deltaw.data.encode import encode_all
from deltaw.data.files import read
from deltaw.decode.sampling import Sampling
from deltaw.errors import UserError
from deltaw.files import adapters
from deltaw.models import checkpoint
from deltaw.models.slots import Slot

SAMPLING = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def trained(tiny_path, tmp_path_factory):
    """Runs in which two personas learnt to answer with one letter, three times."""
    folder = tmp_path_factory.mktemp("personas")
    for letter in "xy":
        file = folder / f"{letter}.jsonl"
        file.write_text(12 * (json.dumps({"prompt": "say", "completion": letter * 3}) + "\n"))
        settings = told(tiny_path, folder, method="full", epochs=20, val="0")
        deltaw.finetune(file, **{**settings, "name": letter})
    return folder / "runs"


@pytest.fixture
def session(trained):
    return Chat(load_all(["x", "y"], trained, dtype="float32"), SAMPLING)


def said(session, question):
    return "".join(session.ask(question))


def test_the_base_is_read_once_however_many_personas_and_switches(trained, monkeypatch):
    loads, tensors = [], []
    real = checkpoint.load
    monkeypatch.setattr(api.checkpoint, "load", lambda *a: (loads.append(a), real(*a))[1])
    session = Chat(load_all(["x", "y"], trained, dtype="float32"), SAMPLING)
    model = session.personas["x"].base.model
    before = {name: b.clone() for name, b in model.named_buffers()}
    for name in ("x", "y", "base", "y", "x"):
        session.switch(name)
        said(session, "say")
        tensors.append([b.data_ptr() for b in model.buffers()])
    assert len(loads) == 1
    assert all(pointers == tensors[0] for pointers in tensors)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_two_personas_of_one_name_are_refused_rather_than_one_of_them_dropped(trained):
    with pytest.raises(UserError, match="Two personas are called 'x'"):
        Chat(load_all(["x", "x"], trained, dtype="float32"), SAMPLING)


def test_a_conversation_that_cannot_be_saved_says_so_and_goes_on(session, tmp_path):
    said(session, "say")
    with pytest.raises(UserError, match="cannot be added to"):
        session.save(tmp_path)
    assert session.turns


def test_each_persona_answers_in_its_own_way_and_none_leaves_a_trace(session, ids):
    model = session.personas["x"].base.model
    bare = our_logits(model, ids)
    assert session.current == "x"
    assert said(session, "say") == "xxx"
    session.system("")
    session.switch("y")
    assert said(session, "say") == "yyy"
    assert all(slot.delta is None for slot in model.modules() if isinstance(slot, Slot))
    assert torch.equal(our_logits(model, ids), bare)


def test_switching_to_nobody_is_refused_with_the_names(session):
    with pytest.raises(UserError, match="There is no persona 'z'") as e:
        session.switch("z")
    assert e.value.remedy == "There are: base, x, y."
    assert session.current == "x"


def test_everybody_answers_the_same_question(session):
    answers = session.compare("say")
    assert list(answers) == ["base", "x", "y"]
    assert (answers["x"], answers["y"]) == ("xxx", "yyy")
    assert answers["base"] not in ("xxx", "yyy")
    assert session.turns == []


def test_what_was_said_stands_before_what_is_asked_next(session, monkeypatch):
    asked = []
    real = Persona.stream
    monkeypatch.setattr(
        Persona, "stream", lambda self, turns, *a: (asked.append(list(turns)), real(self, turns, *a))[1]
    )
    session.system("Be short.")
    said(session, "say")
    said(session, "again")
    system = {"role": "system", "content": "Be short."}
    assert asked[0] == [system, {"role": "user", "content": "say"}]
    assert [turn["role"] for turn in asked[1]] == ["system", "user", "assistant", "user"]
    assert [turn["role"] for turn in session.turns] == ["system", "user", "assistant", "user", "assistant"]


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_was_heard(session):
    heard = iter([True, False])
    pieces = list(session.ask("say", lambda: next(heard)))
    assert "".join(pieces) == session.turns[-1]["content"] == "xx"


def test_an_answer_is_taken_back_with_its_question(session):
    assert session.retry() is None
    said(session, "say")
    seed = session.sampling.seed
    assert session.retry() == "say"
    assert session.turns == []
    assert session.sampling.seed == seed + 1  # or the same would be drawn again


def test_a_saved_conversation_is_a_row_to_train_on(session, tmp_path, tokenizer):
    file = tmp_path / "talk.jsonl"
    with pytest.raises(UserError, match="no answer to save"):
        session.save(file)
    assert not file.exists()
    said(session, "say “это”")
    assert session.save(file) == 1
    said(session, "say")
    assert session.save(file) == 2
    file.write_text(file.read_text().rstrip("\n"))  # as some editors leave it
    assert session.save(file) == 3
    examples = read(file)
    assert [list(e.messages) for e in examples[1:]] == [session.turns] * 2
    assert examples[0].messages[0]["content"] == "say “это”"
    rows = encode_all(examples, tokenizer, "answers", 512)[0]
    assert [row.targets > 0 for row in rows] == [True] * 3


def test_streamed_pieces_are_the_whole_answer(session):
    persona = session.personas["y"]
    assert "".join(persona.stream("say", SAMPLING)) == persona.ask("say", **vars(SAMPLING)) == "yyy"
    assert persona.ask_all(["say", "say"], max_new_tokens=2) == ["yy", "yy"]
    with pytest.raises(UserError, match="Unknown setting 'temprature'"):
        persona.ask("say", temprature=1.0)


def test_a_persona_is_found_by_name_folder_file_or_as_the_newest(trained):
    file = trained / "x" / "adapter" / "adapter.safetensors"
    assert locate("x", trained) == locate(str(trained / "x"), trained) == ("x", file)
    assert locate(str(file), trained) == (
        "x",
        file,
    )
    assert locate(str(file.parent), trained) == (
        "x",
        file,
    )
    assert locate(None, trained)[0] == "y"
    assert load("x", trained, dtype="float32").ask("say") == "xxx"


def test_a_bare_base_can_wear_any_of_its_adapters(trained, tiny_path):
    base = Persona("base", load_base(str(tiny_path), "float32"))
    worn = base.wearing("me", trained / "y" / "adapter" / "adapter.safetensors")
    assert (worn.name, worn.base is base.base, worn.ask("say")) == ("me", True, "yyy")
    assert isinstance(adapters.read_header(trained / "y" / "adapter" / "adapter.safetensors").settings, dict)


def test_whoever_is_not_heard_any_more_says_no_more(session):
    left = iter([True, True, False, False, False])  # before the base speaks, after its first token, ...
    assert session.compare("say", lambda: next(left)) == {"base": session.compare("say")["base"][:2]}


@pytest.mark.parametrize(("limit", "cut"), [(2, True), (3, True), (8, False)])
def test_an_answer_that_was_cut_is_known(session, limit, cut):
    session.sampling = Sampling(max_new_tokens=limit)
    assert said(session, "say") == "xxx"[:limit]
    assert session.cut == cut


def test_a_conversation_that_outgrows_the_model_says_so_and_stays(session):
    said(session, "say")
    before = list(session.turns)
    with pytest.raises(UserError, match=r"tokens long, and this model sees 512.*/reset"):
        said(session, "say " * 200)
    assert session.turns == before


@pytest.fixture(scope="module")
def prompted(tiny_path, tmp_path_factory):
    """A run whose rows all begin with the same system prompt."""
    folder = tmp_path_factory.mktemp("prompted")
    turns = [{"role": "system", "content": "Be z."}, {"role": "user", "content": "say"},
             {"role": "assistant", "content": "zzz"}]  # fmt: skip
    (folder / "z.jsonl").write_text(12 * (json.dumps({"messages": turns}) + "\n"))
    settings = told(tiny_path, folder, method="full", epochs=20, val="0")
    return deltaw.finetune(folder / "z.jsonl", **{**settings, "name": "z"}), folder / "runs"


def test_a_system_prompt_that_all_rows_share_goes_with_the_persona(prompted, trained, tmp_path):
    persona, runs = prompted
    assert persona.system == load("z", runs, dtype="float32").system == "Be z."
    assert load("x", trained, dtype="float32").system == ""
    tokenizer = persona.base.tokenizer
    system, say = {"role": "system", "content": "Be z."}, {"role": "user", "content": "say"}
    assert tokenizer.decode(persona.prompt("say")) == tokenizer.chat([system, say], prompt=True)
    assert persona.ask("say") == "zzz"
    other = {"role": "system", "content": "Be a."}
    assert tokenizer.decode(persona.prompt([other, say])) == tokenizer.chat([other, say], prompt=True)
    session = Chat([load("z", runs, dtype="float32")], SAMPLING)
    assert said(session, "say") == "zzz"
    session.save(tmp_path / "talk.jsonl")
    (row,) = read(tmp_path / "talk.jsonl")
    assert [turn["content"] for turn in row.messages] == ["Be z.", "say", "zzz"]
    session.switch("base")
    assert [t["role"] for t in addressed(session.personas["base"].system, [say])] == ["user"]


def test_rows_with_unlike_system_prompts_leave_none_with_the_persona(tiny_path, tmp_path):
    for name, systems in (("two", ["Be a.", "Be b."]), ("some", ["Be a.", ""])):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"messages": [
            *([{"role": "system", "content": s}] if s else []), {"role": "user", "content": "say"},
            {"role": "assistant", "content": "a"}]}) + "\n" for s in systems))  # fmt: skip
        settings = told(tiny_path, tmp_path, steps=1, val="0")
        assert deltaw.finetune(file, **{**settings, "name": name}).system == ""


def test_a_mistyped_path_is_missed_here_and_not_looked_for_on_the_hub(trained, tmp_path, monkeypatch):
    def hub(name, say):
        raise UserError(f"The hub was asked for {name}.")

    monkeypatch.setattr(api.source, "_from_hub", hub)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="There is no run"):
        api.load_any("runs/villag", trained)
    with pytest.raises(UserError, match="The hub was asked for someone/model"):
        api.load_any("someone/model", trained)
