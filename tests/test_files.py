"""Files are whole or absent, say what they are, and refuse what does not fit; a run folder is found again."""

import errno
import hashlib
import json
import os
import stat

import pytest
import torch
from hypothesis import given, settings, strategies as st
from oracles import scramble
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import deltaw
from deltaw.adapters.adapter import Adapter
from deltaw.errors import Diverged, UserError
from deltaw.files import adapters, runs
from deltaw.files.atomic import disk_is_full, replacing, write_text
from deltaw.files.runs import Run
from deltaw.methods import method
from deltaw.models import checkpoint


@pytest.fixture
def adapter(tiny):
    return scramble(Adapter.build(method("lora", rank=2, targets="q,v", rank_pattern={"layers.0.*": 3}), tiny).eval())


@pytest.fixture
def saved(adapter, tiny, tmp_path):
    path = tmp_path / "persona" / "adapter.safetensors"
    adapters.save(adapter, adapters.Header.of(adapter, "tiny", checkpoint.fingerprint(tiny)), path)
    return path


def names_in(folder):
    return [p.name for p in folder.iterdir()]


def rewrite(path, tensors=None, **header):
    """The same adapter file with other tensors, or another header."""
    old, kept = adapters.read(path)
    save_file(kept if tensors is None else tensors, path, {"deltaw": json.dumps({**vars(old), **header})})


def test_an_adapter_file_says_what_it_is_and_any_tool_can_read_it(saved, adapter, tiny):
    header = adapters.read_header(saved)
    assert (header.method, header.base, header.version, header.format) == ("lora", "tiny", deltaw.__version__, 1)
    assert header.fingerprint == checkpoint.fingerprint(tiny)
    assert method(header.method, **header.settings) == adapter.method
    with safe_open(saved, "pt") as file:
        assert json.loads(file.metadata()["deltaw"])["settings"]["rank_pattern"] == {"layers.0.*": 3}
    tensors = load_file(saved)
    assert tensors.keys() == {f"layers.{i}.self_attn.{n}_proj.{part}" for i in (0, 1) for n in "qv" for part in "AB"}
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert tensors["layers.0.self_attn.q_proj.A"].shape == (3, 32)


def test_an_adapter_loads_ready_for_use_on_its_base_in_any_type(saved, adapter, tiny_path):
    again = adapters.load(saved, checkpoint.load(tiny_path, torch.bfloat16))
    assert not again.training
    for name, tensor in adapters.state(adapter).items():
        assert torch.equal(adapters.state(again)[name], tensor)


def test_another_base_is_refused_with_the_name_of_the_right_one(saved, tiny):
    tiny.norm.gain[0] += 1
    with pytest.raises(UserError) as e:
        adapters.load(saved, tiny)
    assert e.value.what == "This adapter was made for another base model."
    assert "trained on 'tiny'" in e.value.why
    assert e.value.remedy.startswith("Take --base tiny;")
    assert e.value.where == str(saved)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_file_that_ends_early_is_refused(data, tiny_path, tmp_path_factory):
    folder, model = tmp_path_factory.getbasetemp(), checkpoint.load(tiny_path)
    adapter, path = Adapter.build(method("lora", rank=2, targets="q"), model), folder / "cut.safetensors"
    adapters.save(adapter, adapters.Header.of(adapter, "tiny", "f"), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    for read in (adapters.read, adapters.read_header, lambda p: adapters.load(p, model)):
        with pytest.raises(UserError, match="damaged") as e:
            read(path)
        assert e.value.where == str(path)


def test_what_is_no_adapter_is_told_from_what_is_damaged_and_what_is_missing(saved, tmp_path, tiny):
    other = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(2)}, other)
    with pytest.raises(UserError, match="no deltaw adapter"):
        adapters.read(other)
    with pytest.raises(UserError, match="There is no adapter here"):
        adapters.read(tmp_path / "none.safetensors")
    with pytest.raises(UserError):
        adapters.read(tmp_path)
    for header in ("{", "[]", '{"method": "lora"}', '{"nonsense": 1}'):
        save_file({"w": torch.ones(2)}, other, {"deltaw": header})
        with pytest.raises(UserError, match="damaged"):
            adapters.load(other, tiny)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"method": "lorra"}, "no method 'lorra'"),
        ({"settings": {"rannk": 3}}, "Unknown setting 'rannk'"),
        ({"settings": {"rank": 0}}, "rank = 0"),
        ({"settings": {"rank": 5}}, r"shape|do not fit"),
        ({"settings": {"targets": "q"}}, "do not fit"),
        ({"format": 2}, "format|newer"),
    ],
)
def test_a_header_that_does_not_fit_is_refused_by_a_sentence(header, said, saved, tiny):
    rewrite(saved, **header)
    with pytest.raises(UserError, match=said):
        adapters.load(saved, tiny)


def test_tensors_that_do_not_fit_are_refused_by_name(saved, tiny):
    name = "layers.1.self_attn.v_proj.B"
    tensors = load_file(saved)
    odd = {"extra": {**tensors, "extra": torch.ones(1)}, name: {k: t for k, t in tensors.items() if k != name}}
    for said, some in odd.items():
        rewrite(saved, some)
        with pytest.raises(UserError, match=f"1 tensors do not fit this adapter, such as '{said}'"):
            adapters.load(saved, tiny)
    rewrite(saved, {**tensors, name: torch.ones(2, 2)})
    with pytest.raises(UserError, match=rf"'{name}' has shape \(2, 2\), not \(16, 2\)"):
        adapters.load(saved, tiny)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_never_saved(value, saved, adapter, tiny):
    before = saved.read_bytes()
    with torch.no_grad():
        next(adapter.parameters())[0, 0] = value
    with pytest.raises(Diverged, match="holds values that are no numbers") as e:
        adapters.save(adapter, adapters.read_header(saved), saved)
    assert e.value.code == 4
    assert saved.read_bytes() == before
    assert names_in(saved.parent) == [saved.name]


@pytest.mark.parametrize("existing", [None, "old"])
@pytest.mark.parametrize("fault", [OSError(28, "full"), KeyboardInterrupt(), ValueError("bug")], ids=type)
def test_a_fault_while_writing_leaves_what_was_there_and_no_litter(existing, fault, tmp_path):
    path = tmp_path / "folder" / "file"
    if existing:
        write_text(path, existing)

    def write():
        with replacing(path) as scratch:
            scratch.write_text("half of the new")
            assert not path.exists() or path.read_text() == existing
            raise fault

    with pytest.raises(type(fault)):
        write()
    assert names_in(tmp_path) == (["folder"] if existing else [])  # nor the folder that was made for it
    assert not existing or names_in(path.parent) == [path.name]
    assert not existing or path.read_text() == existing


def test_a_file_that_was_written_is_whole_readable_by_others_and_alone(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    for text in ("one", "zwei – 二\u2028\n"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        assert names_in(path.parent) == ["file.txt"]


def test_runs_are_named_by_data_method_and_the_first_free_number(tmp_path):
    for number in (1, 2, 3):
        assert (
            runs.create(tmp_path / "runs", None, "train", "lora").folder == tmp_path / "runs" / f"train-lora-{number}"
        )
    (tmp_path / "runs" / "train-lora-2").rmdir()
    assert runs.create(tmp_path / "runs", None, "train", "lora").name == "train-lora-2"
    assert runs.create(tmp_path / "runs", "mine", "train", "lora").name == "mine"
    with pytest.raises(UserError, match=r"There is a run 'mine' already\. Take another --name\.$"):
        runs.create(tmp_path / "runs", "mine", "train", "lora")  # an empty folder is no run to go on with
    (tmp_path / "runs" / "mine" / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"There is a run 'mine' already.*--resume mine"):
        runs.create(tmp_path / "runs", "mine", "train", "lora")
    for stem, name in ((".hidden", "hidden-lora-1"), ("--x", "x-lora-1"), ("-", "run-lora-1")):
        assert runs.create(tmp_path / "runs", None, stem, "lora").name == name
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        runs.create(tmp_path / "link", None, "train", "lora")


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "-x", "a b", "a\n", "", "a:b", "~"])
def test_a_name_that_is_no_folders_name_is_refused(name, tmp_path):
    with pytest.raises(UserError):
        runs.create(tmp_path / "runs", name, "train", "lora")
    assert not (tmp_path / "runs").exists()


def test_a_run_is_found_by_name_by_path_or_as_the_newest(tmp_path):
    with pytest.raises(UserError, match="There is no run yet"):
        runs.find(None, tmp_path / "runs")
    with pytest.raises(UserError, match=r"no run 'x'.*Train one"):
        runs.find("x", tmp_path / "runs")
    for i, name in enumerate(["first", "third", "second"]):
        run = runs.create(tmp_path / "runs", name, "", "")
        run.write_config({"data": [], "seed": i})
        os.utime(run.config, (1000 + 2 * (name == "third") + (name == "second"),) * 2)
    (tmp_path / "runs" / "no-run").mkdir()
    assert runs.find(None, tmp_path / "runs").name == "third"
    assert runs.find("first", tmp_path / "runs").read_config() == {"data": [], "seed": 0}
    assert runs.find(str(tmp_path / "runs" / "second"), tmp_path / "elsewhere").name == "second"
    with pytest.raises(UserError, match=r"no run 'thrid'.*Did you mean 'third'"):
        runs.find("thrid", tmp_path / "runs")


def test_a_runs_settings_and_notes_read_back(tmp_path):
    run, values = Run(tmp_path / "run"), {"base": "Größe: 二", "rank": 4, "rate": 1e-4, "val": None, "data": ["a:2"]}
    run.write_config(values)
    run.write_json(run.plan, values)
    assert run.read_config() == json.loads(run.plan.read_text()) == values
    assert list(run.read_config()) == list(values)


@pytest.mark.parametrize("content", ["- a\n", "abc", "", "a: [", "3"])
def test_a_run_without_readable_settings_says_so(content, tmp_path):
    run = Run(tmp_path)
    with pytest.raises(UserError, match=r"no readable config\.yaml"):
        run.read_config()
    run.config.write_text(content)
    with pytest.raises(UserError, match=r"no readable config\.yaml"):
        run.read_config()


@given(content=st.binary(max_size=100))
def test_a_digest_is_the_files_sha256(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "digest"
    path.write_bytes(content)
    assert runs.digest(path) == hashlib.sha256(content).hexdigest()


def test_the_newest_run_is_the_one_that_was_saved_or_ended_last(tmp_path):
    first, second = (runs.create(tmp_path, name, "x", "lora") for name in ("first", "second"))
    for at, run in enumerate((first, second)):
        run.write_config({"data": []})
        os.utime(run.config, (at, at))
    assert runs.find(None, tmp_path) == second
    first.adapter.parent.mkdir()
    first.adapter.write_bytes(b"")
    os.utime(first.adapter, (5, 5))
    assert runs.find(None, tmp_path) == first


def test_what_no_run_can_be_taken_for_is_said_with_what_to_do(tmp_path):
    def refused(suits=lambda run: run.adapter.exists()):
        with pytest.raises(UserError) as e:
            runs.find(None, tmp_path, suits)
        return f"{e.value.what} {e.value.remedy}"

    assert refused() == "There is no run yet. Train one: deltaw train FILE"
    run = runs.create(tmp_path, "mine", "x", "lora")
    run.write_config({"data": []})
    assert refused() == (f"The run 'mine' has not ended. Go on with it: deltaw train --resume mine --runs {tmp_path}")
    with run.held():
        assert refused() == "The run 'mine' is still being trained. Wait for it."
    run.adapter.parent.mkdir()
    run.adapter.write_bytes(b"")
    assert refused(lambda run: not run.adapter.exists()) == f"Every run has ended. deltaw chat mine --runs {tmp_path}"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EIO])
def test_what_safetensors_tells_in_words_is_an_error_of_the_system(number, tmp_path):
    with pytest.raises(OSError, match=os.strerror(number)) as e, replacing(tmp_path / "x"):
        raise SafetensorError(f"I/O error: something (os error {number})")
    assert e.value.errno == number
    assert disk_is_full(e.value) == (number != errno.EIO)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [lambda said: said.update(settings={**said["settings"], "alpha": 99.0}),
                                    lambda said: said.update(system="Obey.")])  # fmt: skip
def test_a_header_that_was_changed_is_found(change, saved):
    with safe_open(saved, "pt") as file:
        said = json.loads(file.metadata()["deltaw"])
    tensors = load_file(saved)
    change(said)
    save_file(tensors, saved, {"deltaw": json.dumps(said)})
    with pytest.raises(UserError, match="checksum does not fit"):
        adapters.read(saved)


def test_a_flipped_bit_of_a_tensor_is_found(saved):
    body = bytearray(saved.read_bytes())
    body[-7] ^= 4
    saved.write_bytes(body)
    with pytest.raises(UserError, match="checksum does not fit"):
        adapters.read(saved)


def test_hidden_folders_are_no_runs(tmp_path, saved):
    for name in (".half", "whole"):
        Run(tmp_path / "runs" / name).adapter.parent.mkdir(parents=True)
        Run(tmp_path / "runs" / name).adapter.write_bytes(saved.read_bytes())
    os.utime(Run(tmp_path / "runs" / "whole").adapter, (1, 1))
    assert runs.find(None, tmp_path / "runs").name == "whole"
