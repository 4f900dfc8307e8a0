"""Whatever is in a file that is loaded, it is loaded or refused by a sentence: there is no traceback, ever."""

import json
import shutil
from contextlib import suppress
from itertools import islice

import pytest
import yaml
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings, strategies as st
from oracles import scramble
from parity.test_gguf_families import merging_tokenizer
from small import prepared, stopping_at, told

from deltaw.adapters.adapter import Adapter
from deltaw.api import finetune
from deltaw.errors import UserError
from deltaw.files import adapters, peft
from deltaw.methods import method
from deltaw.models import checkpoint
from deltaw.models.gguf_write import write
from deltaw.models.tokenizer import Tokenizer
from deltaw.settings import read_yaml
from deltaw.train.report import write_report

HEAD = 3000
"""Bytes at the beginning of a file of tensors, where everything but numbers stands."""
fuzz = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@st.composite
def damaged(draw, whole):
    """The bytes of a file with some changed, put in, or cut off."""
    body = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(body), HEAD) - 1))
        body[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=9))
    return bytes(body[: draw(st.just(len(body)) | st.integers(0, len(body)))])


def replaced(draw, told):
    """A JSON object with one of its values changed, somewhere in it."""
    key = draw(st.sampled_from(sorted(told)))
    if isinstance(told[key], dict) and told[key] and draw(st.booleans()):
        return {**told, key: replaced(draw, told[key])}
    return {**told, key: draw(values)}


@pytest.fixture(scope="module")
def home(tiny_path, tmp_path_factory):
    """Files of every kind that is loaded: a model, the same as GGUF, a PEFT folder, an adapter, a stopped run."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(tiny_path, folder / "base")
    merging_tokenizer().save(str(folder / "base" / "tokenizer.json"))
    model, tokenizer = checkpoint.load(folder / "base"), Tokenizer.load(folder / "base")
    write(model, tokenizer, folder / "base.gguf", "F32", "base")
    adapter = scramble(Adapter.build(method("lora", rank=2, targets="q,v"), model).eval())
    adapters.save(adapter, adapters.Header.of(adapter, "base", checkpoint.fingerprint(model)), folder / "a.safetensors")
    peft.write(adapter, model, "base", folder / "peft")
    peft.write(Adapter.build(method("prefix_tuning", tokens=3), model).eval(), model, "base", folder / "prefix")
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    list(prepared(folder / "rows.jsonl", told(folder / "base", folder, steps=4), stopping_at(3)).events())
    return folder


def with_bytes(home, name, body, load):
    """Load with other bytes in the place of a file's, and put it back."""
    file = home / name
    whole = file.read_bytes()
    file.write_bytes(body)
    try:
        with suppress(UserError):
            load(home)
    finally:
        file.write_bytes(whole)


def load_base(home):
    checkpoint.load(home / "base")


def load_gguf(home):
    checkpoint.load(home / "base.gguf")
    Tokenizer.load(home / "base.gguf")


def load_tokenizer(home):
    tokenizer = Tokenizer.load(home / "base")
    tokenizer.decode(tokenizer.encode(tokenizer.chat([{"role": "user", "content": "a"}], prompt=True)))


def load_adapter(home):
    adapters.load(home / "a.safetensors", MODELS.setdefault(home, checkpoint.load(home / "base")))


def load_peft(home):
    peft.read(home / "peft", MODELS.setdefault(home, checkpoint.load(home / "base")))


def load_prefix(home):
    peft.read(home / "prefix", MODELS.setdefault(home, checkpoint.load(home / "base")))


def go_on(home):
    list(islice(finetune.resume("run", home / "runs").events(), 3))  # it may have been told a billion steps


def report(home):
    write_report(home / "runs" / "run")


MODELS = {}
NEWEST = "runs/run/checkpoints/step-0000002.safetensors"
BYTES = {"base/model.safetensors": load_base, "base/config.json": load_base, "base.gguf": load_gguf,
         "base/tokenizer.json": load_tokenizer, "base/tokenizer_config.json": load_tokenizer,
         "base/chat_template.jinja": load_tokenizer, "a.safetensors": load_adapter,
         "peft/adapter_model.safetensors": load_peft, "peft/adapter_config.json": load_peft,
         "prefix/adapter_model.safetensors": load_prefix, "prefix/adapter_config.json": load_prefix,
         "runs/run/events.jsonl": report}  # fmt: skip
VALUES = {name: BYTES[name] for name in ("base/config.json", "base/tokenizer_config.json", "base/tokenizer.json",
                                         "peft/adapter_config.json", "prefix/adapter_config.json")}  # fmt: skip


@pytest.mark.parametrize("name", BYTES)
@fuzz
@given(data=st.data())
def test_any_bytes_are_loaded_or_refused(name, home, data):
    body = data.draw(damaged((home / name).read_bytes()))
    with_bytes(home, name, body, BYTES[name])


@pytest.mark.parametrize("name", VALUES)
@fuzz
@given(data=st.data())
def test_any_values_are_loaded_or_refused(name, home, data):
    told = replaced(data.draw, json.loads((home / name).read_text()))
    with_bytes(home, name, json.dumps(told).encode(), VALUES[name])


@settings(parent=fuzz, max_examples=200)
@given(data=st.data())
def test_any_gguf_field_is_loaded_or_refused(home, data):
    """Its fields are numbers and texts in a binary form: bytes within one are changed, and its length is left."""
    whole = (home / "base.gguf").read_bytes()
    field = data.draw(
        st.sampled_from(sorted(GGUFReader(str(home / "base.gguf")).fields.values(), key=lambda f: f.name))
    )
    body, length = bytearray(whole), sum(part.nbytes for part in field.parts)
    at = field.offset + data.draw(st.integers(0, min(length, 200) - 1))
    body[at] = data.draw(st.integers(0, 255))
    with_bytes(home, "base.gguf", bytes(body), load_gguf)


@settings(parent=fuzz, max_examples=20)
@given(data=st.data())
@pytest.mark.parametrize("name", ["config.yaml", "plan.json", "manifest.json", NEWEST.removeprefix("runs/run/")])
def test_a_run_with_any_damage_goes_on_or_is_refused(name, home, data, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    for part in ("runs", "base", "rows.jsonl"):
        (shutil.copytree if (home / part).is_dir() else shutil.copy)(home / part, copy / part)
    for made in ("config.yaml", "manifest.json"):
        text = (copy / "runs" / "run" / made).read_text()
        (copy / "runs" / "run" / made).write_text(text.replace(str(home), str(copy)))
    file = copy / "runs" / "run" / name
    if name.endswith(".safetensors"):
        file.write_bytes(data.draw(damaged(file.read_bytes())))
    elif name.endswith(".json"):
        file.write_text(json.dumps(replaced(data.draw, json.loads(file.read_text()))))
    else:
        changed = replaced(data.draw, yaml.safe_load(file.read_text()))
        file.write_text(yaml.safe_dump(changed))
    with suppress(UserError):
        go_on(copy)


@settings(parent=fuzz, max_examples=200)
@given(body=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_yaml_is_read_or_refused(body, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_bytes(body)
    with suppress(UserError):
        assert isinstance(read_yaml(file), dict)
