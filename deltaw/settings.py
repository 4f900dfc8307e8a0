"""Settings: frozen dataclasses with a sentence under each field, from which flags, YAML keys and keywords come.

Nothing here imports torch, so that asking for help is quick.
"""

import ipaddress
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, dataclass_transform

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import to_jsonable_python

from deltaw.errors import UserError, explained, nearest

T = TypeVar("T")
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Rank = Annotated[int, Field(ge=1, le=8192)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Text = Annotated[str, BeforeValidator(lambda said: str(said) if isinstance(said, int | float | Path) else said)]
"""A text; numbers and paths are taken as they are written."""
KEY = "DELTAW_API_KEY"
"""Where a server's key is looked for that is not on the command line."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make a class a checked, frozen, keyword-only dataclass that refuses unknown fields."""
    return cast("type[T]", pydantic_dataclass(cls, frozen=True, kw_only=True, config=ConfigDict(extra="forbid")))


@settings
class Training:
    """What `deltaw train` can be told, beside the files and the method's own settings."""

    base: Text = "smollm2-135m"
    """The model to fine-tune: a folder, a GGUF file, a short name or a hub id."""
    base_format: str | None = None
    """Pack its matrices: nf4-dq, nf4, nf3, int4-g32, int8, … By default: as the method has it, or not at all."""
    method: str = "lora"
    """The technique; its own settings are flags too (see `deltaw train --method NAME --help`)."""
    name: str | None = None
    """Name of the run's folder. By default: the data's name, the method and a number."""
    runs: Path = Path("runs")
    """Folder in which run folders are made."""

    val: Text | None = None
    """Validation rows: a file, or the share of each file to hold out (0: none). By default 0.05, and at most 1,000."""
    train_on: Literal["answers", "all"] = "answers"
    """Which tokens are learnt: the assistant's answers, or every token (plain text)."""
    max_tokens: Count | None = None
    """Rows longer than this many tokens are cut, and counted. By default: the model's context."""

    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3.0
    """How often each row is seen."""
    steps: Count | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""
    minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Fit the whole schedule into this many minutes, as measured on this machine, whatever `epochs` says."""
    batch_rows: Count | None = None
    """Rows per optimizer step. By default: 8, or fewer if they are so long that a step had over 2,048 tokens."""
    micro_tokens: Count = 2048
    """Tokens per forward pass: a step with more is split, with the same result and less memory."""

    learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Peak rate. By default: chosen for the method and the model's width."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after warm-up."""
    warmup: Share = 0.05
    """Share of the steps in which the rate rises to its peak."""
    optimizer: Literal["adamw", "paged_adamw"] = "adamw"
    """Paged: its two moments lie in a file that the system moves in and out of memory; the same numbers."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """AdamW's decoupled weight decay."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the whole gradient (0: no limit)."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Keep only layer inputs and compute the rest again: about a third more time, far less memory. Auto: if it must."""

    evaluations: Annotated[int, Field(ge=0)] = 6
    """How often the validation loss is measured during the run."""
    patience: Annotated[int, Field(ge=0)] = 2
    """Stop after this many evaluations in a row without a better validation loss (0: never)."""
    keep_best: bool = True
    """End with the adapter of the best validation loss rather than the last."""
    save_every: Count | None = None
    """Steps between checkpoints. By default: at each evaluation, and at least once every two minutes."""
    sample: str | None = None
    """A question to answer before and after training. By default: the first of the validation rows."""

    seed: Seed = 0
    """Seed of the adapter's start, the order of rows and dropout."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the base's weights and activations. Auto: bfloat16 where the processor multiplies it, else float32."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, ..."""
    threads: Count | None = None
    """Processor threads. By default: one per core."""


@settings
class Machine:
    """Where and how the other commands compute."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights. Auto: bfloat16 where the processor multiplies it, else float32."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, ..."""
    threads: Count | None = None
    """Processor threads. By default: one per core."""


@settings
class Serving:
    """What `deltaw serve` can be told, beside the base and its personas."""

    host: str = "127.0.0.1"
    """The address to listen at; another than this machine's own asks for a key."""
    port: Annotated[int, Field(ge=0, lt=2**16)] = 8000
    """The port (0: any that is free)."""
    key: str = ""
    """Who asks must bring this key; DELTAW_API_KEY says it unseen by others on the machine."""
    budget_gb: Annotated[float, Field(gt=0, le=10_000)] = 1.0
    """Memory for keys, values and adapters together, in GiB."""
    most: Annotated[int, Field(ge=1, le=1024)] = 32
    """Answers that are computed at once; others wait."""
    chunk: Count = 256
    """Tokens of prompts that a step computes at most, beside a token of each answer."""

    tensor_parallel: Count = 1
    """Processes that compute the model together, each with a part of it."""
    replicas: Count = 1
    """Servers that answer side by side, on Ray Serve; who asks for a persona comes to where it is loaded."""
    keys: Path | None = None
    """A file of keys that `deltaw key` made: who may ask whom, and how much."""
    first_token_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    """Who would wait longer for an answer to begin is told to come again, and when (0: all may wait for ever)."""
    request_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    """How long an answer may take."""
    body_mb: Annotated[float, Field(gt=0, le=10**6)] = 8.0
    """The largest request, in MB."""
    upload_mb: Annotated[float, Field(gt=0, le=10**6)] = 1024.0
    """The largest adapter that may be uploaded, in MB."""
    share_prefixes: bool = False
    """Let keys use the beginnings of each other's prompts, if they are the same: faster, but time may tell of them."""

    @property
    def alone(self) -> bool:
        """Whether only this machine can ask."""
        with suppress(ValueError):
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        return False


@settings
class Rights:
    """What a key is for."""

    personas: tuple[str, ...] | None = None
    """Whom it may talk with, `base` among them or not; others are not there for it. By default: all."""
    requests_per_minute: Count | None = None
    """How many requests it may send. By default: any number."""
    tokens_per_minute: Count | None = None
    """How many tokens it may ask and be told. By default: any number."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Whose turn comes before that of others: lower ones."""
    manage: bool = False
    """Whether it may put adapters up and down, and read what is measured and where files lie."""


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Make settings from plain values.

    Raises:
        UserError: an unknown key (with the nearest known one), or a value that does not fit.
    """
    known = names(cls)
    for key in values:
        if key not in known:
            raise UserError(f"Unknown setting '{key}'.", where=where, remedy=nearest(str(key), known))
    try:
        return cls(**values)
    except ValidationError as e:
        raise UserError(complaint(e), where=where) from None


def complaint(error: ValidationError) -> str:
    """Say in one sentence what pydantic found first."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"]) or "settings"
    return f"{name} = {first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}."


def names(cls: Any) -> list[str]:
    """The names of a settings class's fields."""
    return [f.name for f in fields(cls) if f.init]


def plain(value: Any) -> dict[str, Any]:
    """Settings as JSON and YAML can hold them."""
    return dict(to_jsonable_python(value))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        UserError: the file is missing, or is no YAML mapping; says the line.
    """
    with (explained("The configuration file cannot be read.", OSError, where=path, why="{error.strerror}."),
          explained("This is not UTF-8 text.", UnicodeDecodeError, where=path, why="",
                    remedy="Save the file as UTF-8.")):  # fmt: skip
        text = path.read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # a date that is none, brackets without end
        mark = getattr(e, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError("This is not YAML.", where=f"{path}{line}", why=str(getattr(e, "problem", e))) from None
    if not isinstance(values, dict):
        raise UserError("A configuration file is a mapping of settings to values.", where=str(path),
                        remedy="For example: learning_rate: 0.001")  # fmt: skip
    return values


def check_file(path: Path, values: Mapping[str, Any], *classes: Any) -> None:
    """Refuse a configuration file with a key that no class has (`data` aside), or a value that does not fit.

    Raises:
        UserError: says the line, and the nearest known key or what is wrong with the value.
    """
    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
        where = f"{path}:{key.start_mark.line + 1}"
        owner = next((cls for cls in classes if key.value in names(cls)), None)
        if owner is not None:
            build(owner, {key.value: values[key.value]}, where)
        elif key.value == "data":
            said = values["data"]
            files = said if isinstance(said, list) else [said]
            if not said or not all(isinstance(file, str) for file in files):
                raise UserError("'data' is not a file or a list of files.", where=where,
                                remedy="For example: data: [rows.jsonl, more.jsonl:2]")  # fmt: skip
        else:
            known = ["data", *(name for cls in classes for name in names(cls))]
            raise UserError(f"Unknown setting '{key.value}'.", where=where, remedy=nearest(key.value, known))
