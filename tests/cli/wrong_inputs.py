"""What people give by mistake: for each a folder made wrong, and a command. `docs/errors.md` shows the panels."""

import errno
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from small import ROW, TRAIN, prepared, stopping_at, write_rows

from deltaw.api import finetune
from deltaw.files import adapters, runs
from deltaw.models import checkpoint


@dataclass(frozen=True)
class Wrong:
    """`prepare` makes the folder wrong; `writes`: the command may leave a run behind, whole as far as it came."""

    title: str
    prepare: Callable[[Path, object], None]
    arguments: tuple[str, ...] = TRAIN
    code: int = 2
    writes: bool = False


def rows(*given):
    return lambda here, _: write_rows(here / "rows.jsonl", *given)


def content(file, body):
    def prepare(here, _):
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        (here / file).write_bytes(body if isinstance(body, bytes) else body.encode())

    return prepare


def nothing(here, _):
    pass


def own_base(here):
    """The base as a copy that may be damaged."""
    tiny = (here / "base").resolve()
    (here / "base").unlink()
    shutil.copytree(tiny, here / "base")
    return here / "base"


def base(change):
    return lambda here, _: change(own_base(here))


def edited(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(file):
    file.write_bytes(file.read_bytes()[:-1000])


def without(file):
    return base(lambda folder: (folder / file).unlink())


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def infinite(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")


def more_words(folder):
    """A tokenizer that knows more than the model has rows for."""
    told = json.loads((folder / "tokenizer.json").read_text())
    told["added_tokens"].append({**told["added_tokens"][-1], "id": 260, "content": "<|extra|>"})
    (folder / "tokenizer.json").write_text(json.dumps(told))
    (folder / "chat_template.jinja").write_text("<|extra|>" + (folder / "chat_template.jinja").read_text())


def adapter(change):
    """A run `mine` whose adapter's file is changed."""

    def prepare(here, _):
        made = finetune.prepare(["rows.jsonl"], {"base": "base", "name": "mine", "dtype": "float32", "threads": 1,
                                                 "steps": 1, "evaluations": 0})  # fmt: skip
        run, header, worn = made.job.run, made.job.header, made.job.adapter
        header = adapters.Header(**{**vars(header), "base": "base"})
        change(worn, header, run)

    return prepare


def flip(file):
    body = bytearray(file.read_bytes())
    body[-201] ^= 1
    file.write_bytes(body)


def flipped(worn, header, run):
    adapters.save(worn, header, run.adapter)
    flip(run.adapter)


def flipped_base(worn, header, run):
    """A bit of the base is flipped after the adapter was trained."""
    adapters.save(worn, header, run.adapter)
    flip(own_base(run.folder.parent.parent) / "model.safetensors")


def sealed_and_flipped(folder):
    """A model that was written by `deltaw`, and damaged."""
    checkpoint.save(checkpoint.load(folder), folder)
    flip(folder / "model.safetensors")


def header_of(**changes):
    return lambda worn, header, run: adapters.save(worn, adapters.Header(**{**vars(header), **changes}), run.adapter)


def stopped(here):
    """A run that was stopped, and its folder."""
    settings = {"base": "base", "name": "mine", "dtype": "float32", "threads": 1, "steps": 3, "evaluations": 0}
    list(prepared("rows.jsonl", settings, stopping_at(2)).events())
    return here / "runs" / "mine"


def newer(here, _):
    """As a later version might write it."""
    file = stopped(here) / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 9}))


def edited_settings(here, _):
    file = stopped(here) / "config.yaml"
    file.write_text(file.read_text().replace("rank: 16", "rank: 8"))


def unsaid(here, _):
    (stopped(here) / "manifest.json").write_text("{}")


def peft(**changes):
    """A folder as PEFT writes it, whose configuration is changed."""

    def prepare(here, _):
        (here / "theirs").mkdir()
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
        tensors = {f"{key}A.weight": torch.ones(4, 32), f"{key}B.weight": torch.ones(32, 4)}
        tensors |= changes.get("tensors", {})
        if changes.get("dead"):
            tensors[f"{key}B.weight"].zero_()
        save_file(tensors, here / "theirs" / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
        (here / "theirs" / "adapter_config.json").write_text(json.dumps({**config, **changes.get("config", {})}))

    return prepare


def refusing(error):
    def prepare(here, monkeypatch):
        def refuse(*_):
            raise error

        monkeypatch.setattr(runs, "create", refuse)
        monkeypatch.setattr(finetune.runs, "create", refuse)

    return prepare


BROKEN = '{"messages": [}'
HUGE = struct.pack("<Q", 1 << 40) + b"{}"
CHAT = ("generate", "say 1", "--run", "mine", "--base", "base", "--dtype", "float32")
IMPORT = ("import", "theirs", "--base", "base", "--dtype", "float32")
ELSEWHERE = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
EVIL = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
LONG = {"prompt": "why " * 200, "completion": "b"}

WRONG = [
    Wrong("A data file that is not there", nothing, ("train", "nothing.jsonl")),
    Wrong("No data", nothing, ("train",)),
    Wrong("A folder for a file", nothing, ("train", "base")),
    Wrong("An empty file", content("rows.jsonl", "")),
    Wrong("Broken JSON at row 11", rows(*[ROW] * 10, BROKEN, ROW)),
    Wrong("Content that is null", rows(ROW, {"messages": [{"role": "user", "content": None}]})),
    Wrong("Another schema", rows(ROW, ROW, {"question": "a", "reply": "b"})),
    Wrong("A role that there is not", rows({"messages": [{"role": "human", "content": "a"}]})),
    Wrong(
        "Mixed encodings",
        content("rows.jsonl", json.dumps(ROW).encode() + b"\n" + '{"text": "café"}'.encode("latin-1")),
    ),
    Wrong(
        "A list with a comma missing",
        content("rows.json", f"[{json.dumps(ROW)}\n{json.dumps(ROW)}]"),
        ("train", "rows.json", *TRAIN[2:]),
    ),
    Wrong("Rows as Python shows them", rows(ROW, "{'text': 'a'}")),
    Wrong("A key that stands twice", rows(ROW, '{"text": "a", "text": "b"}')),
    Wrong(
        "A list that is cut off",
        content("rows.json", f'[{json.dumps(ROW)},\n{{"prompt": "a'),
        ("train", "rows.json", *TRAIN[2:]),
    ),
    Wrong(
        "Rows within an object",
        content("rows.json", f'{{"data": [{json.dumps(ROW)}]}}'),
        ("train", "rows.json", *TRAIN[2:]),
    ),
    Wrong("Objects over several lines", rows(json.dumps(ROW, indent=2))),
    Wrong("A weight of a single row", rows({**ROW, "weight": 2})),
    Wrong(
        "A table whose rows are not of one length",
        content("rows.csv", "prompt,completion\na,b\nc\n"),
        ("train", "rows.csv", *TRAIN[2:]),
    ),
    Wrong("More tokens than the model sees", nothing, (*TRAIN, "--max-tokens", "9999")),
    Wrong("Rows of which nothing is left to learn within the context", rows(*[LONG] * 3)),
    Wrong("Rows with nothing to learn", rows(*[{"messages": ROW["messages"][:1]}] * 3)),
    Wrong("A fault in the validation file", content("val.jsonl", "[]"), (*TRAIN, "--val", "val.jsonl")),
    Wrong("A validation share out of range", nothing, (*TRAIN, "--val", "1.5")),
    Wrong("A target that names no layer", nothing, (*TRAIN, "--targets", "q_prj")),
    Wrong("An unknown option", nothing, (*TRAIN, "--learning-rat", "0.1")),
    Wrong("A value that does not fit", nothing, (*TRAIN, "--rank", "0")),
    Wrong(
        "An unknown key of a configuration file",
        content("run.yaml", "epochs: 2\nlearning-rat: 0.1\n"),
        (*TRAIN, "--config", "run.yaml"),
    ),
    Wrong(
        "A configuration file that is no YAML", content("run.yaml", "epochs: [2\n"), (*TRAIN, "--config", "run.yaml")
    ),
    Wrong("An unknown method", nothing, (*TRAIN, "--method", "lorra")),
    Wrong("An unknown model", nothing, ("train", "rows.jsonl", "--base", "smolm2-135m")),
    Wrong("A model of another family", base(lambda folder: edited(folder, model_type="mamba"))),
    Wrong("A model folder without weights", without("model.safetensors")),
    Wrong("A model folder without a tokenizer", without("tokenizer.json")),
    Wrong("Weights that are a pickle", base(pickled)),
    Wrong("Truncated weights", base(lambda folder: cut(folder / "model.safetensors"))),
    Wrong("Weights whose header is damaged", base(lambda folder: (folder / "model.safetensors").write_bytes(HUGE))),
    Wrong("A weight that is missing", base(lambda folder: weights(folder, lambda t: t.pop("model.norm.weight")))),
    Wrong(
        "Weights of other sizes than the configuration says", base(lambda folder: edited(folder, intermediate_size=60))
    ),
    Wrong(
        "A GGUF file that is none",
        content("base.gguf", b"GGUF" + bytes(40)),
        ("train", "rows.jsonl", "--base", "base.gguf"),
    ),
    Wrong("A tokenizer of another model", base(more_words)),
    Wrong("A hostile chat template", base(lambda folder: (folder / "chat_template.jinja").write_text(EVIL))),
    Wrong(
        "A chat template that never ends",
        base(lambda folder: (folder / "chat_template.jinja").write_text("{% for i in range(10**9) %}x{% endfor %}")),
    ),
    Wrong("A flipped bit in a model that deltaw wrote", base(sealed_and_flipped)),
    Wrong("A flipped bit in a base that an adapter was trained on", adapter(flipped_base), CHAT),
    Wrong("A flipped bit in an adapter", adapter(flipped), CHAT),
    Wrong("An adapter of another base", adapter(header_of(fingerprint="0" * 32)), CHAT),
    Wrong("An adapter whose rank is not the one it says", adapter(header_of(settings={"rank": 3})), CHAT),
    Wrong("An adapter of a newer version", adapter(header_of(format=9)), CHAT),
    Wrong("A run of a newer version", newer, ("train", "--resume", "mine")),
    Wrong("A run whose settings were edited", edited_settings, ("train", "--resume", "mine")),
    Wrong("A run without a manifest that can be read", unsaid, ("train", "--resume", "mine")),
    Wrong("An adapter that is none", content("mine.safetensors", b"nothing"), ("inspect", "mine.safetensors")),
    Wrong("A run that has no result yet", adapter(lambda *_: None), CHAT),
    Wrong("A PEFT adapter for a layer that is not there", peft(tensors={ELSEWHERE: torch.ones(4, 32)}), IMPORT),
    Wrong("A PEFT adapter that was never trained", peft(dead=True), IMPORT),
    Wrong("A PEFT adapter of another rank than it says", peft(config={"r": 16}), IMPORT),
    Wrong("A PEFT adapter of another method", peft(config={"peft_type": "IA3"}), IMPORT),
    Wrong("An adapter that is a pickle", content("theirs/adapter_0.pt", b"\x80\x02"), IMPORT),
    Wrong("A folder that is there already", adapter(lambda *_: None), (*TRAIN, "--name", "mine")),
    Wrong(
        "An output folder that cannot be written",
        refusing(PermissionError(errno.EACCES, "Permission denied", "runs/mine")),
    ),
    Wrong(
        "A loss that is not a number",
        base(lambda folder: weights(folder, infinite)),
        (*TRAIN, "--name", "mine"),
        4,
        True,
    ),
    Wrong(
        "A full disk",
        refusing(OSError(errno.ENOSPC, "No space left on device", "runs/mine")),
        (*TRAIN, "--name", "mine"),
        3,
    ),
]
