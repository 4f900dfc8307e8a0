"""One base model that wears any number of adapters: load it once, switch by pointer writes, ask."""

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.adapters.adapter import Adapter, bare
from deltaw.decode.generate import Answer, complete, stream
from deltaw.decode.sampling import Sampling
from deltaw.errors import UserError, WillNotFit
from deltaw.files import adapters, runs
from deltaw.kernels.library import instruction_set
from deltaw.kernels.memory import frugal, is_full
from deltaw.models import checkpoint, source
from deltaw.models.decoder import Decoder
from deltaw.models.device import choose_device, choose_dtype
from deltaw.models.tokenizer import Message, Tokenizer
from deltaw.settings import build
from deltaw.weights.formats import parse

BASE = "base"
"""What the persona without an adapter is called."""
MOST_THREADS = 8
"""For each core: more only wait for one another."""
Conversation = str | Sequence[Message]
"""A question, or the turns so far."""
Pair = tuple[Tensor, Tensor]
"""A_RI and B_OR, whose product B A is an update."""


@dataclass(frozen=True)
class Base:
    """A model in memory with its tokenizer and where it came from."""

    name: str
    path: Path
    model: Decoder = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    fingerprint: str
    form: str = ""
    """How its matrices were packed when it was loaded; empty: as they are."""

    @property
    def origin(self) -> str:
        """The name by which it is found again from any folder: paths are absolute."""
        return str(self.path.absolute()) if Path(self.name).exists() else self.name

    def header(self, adapter: Adapter, system: str) -> adapters.Header:
        """The header of an adapter for this base."""
        return adapters.Header.of(adapter, self.origin, self.fingerprint, system, self.form)


def load_base(name: str, dtype: str = "auto", device: str = "auto", threads: int | None = None,
              say: source.Say = lambda _: None, base_format: str = "") -> Base:  # fmt: skip
    """Bring a base model into memory, fetched first if need be; its matrices packed, if a format is given.

    Raises:
        UserError: there is no such model, it is not supported, or its weights are not those we wrote.
        WillNotFit: memory was full.
    """
    instruction_set()  # one that is not to be had is told before anything is done
    cores = os.cpu_count() or 1
    if threads is not None and threads > MOST_THREADS * cores:
        raise UserError(f"{threads} threads are too many: this machine has {cores} cores.",
                        remedy=f"Take --threads {cores}.")  # fmt: skip
    if threads is not None:
        torch.set_num_threads(threads)
    path, where = source.find(name, say), choose_device(device)
    form = parse(base_format) if base_format else None
    try:
        with frugal():
            model = checkpoint.load(path, choose_dtype(dtype, where), str(where), form)
            base = Base(name, path, model, Tokenizer.load(path), checkpoint.fingerprint(model), base_format)
    except (RuntimeError, MemoryError) as e:
        if not is_full(e):
            raise
        raise WillNotFit("Memory was full while the model was read.", where=str(path), why=str(e).splitlines()[0],
                         remedy="Free some, or take --base-format nf4, or a smaller model.") from None  # fmt: skip
    if form is None or checkpoint.is_packed(path):
        checkpoint.check_seal(path, base.fingerprint)
    return base


@dataclass(frozen=True)
class Persona:
    """A base and what it wears (`adapter` None: nothing), and the `system` prompt that all its rows had."""

    name: str
    base: Base
    adapter: Adapter | None = field(default=None, repr=False)
    system: str = ""

    def on(self) -> AbstractContextManager[Any]:
        """Wear this persona, and nothing else, for the length of a `with` block."""
        return bare(self.base.model) if self.adapter is None else self.adapter.on()

    @property
    def bare(self) -> bool:
        """Whether it wears nothing."""
        return self.adapter is None

    def worn(self, purpose: str) -> Adapter:
        """What it wears.

        Raises:
            UserError: nothing, so that it cannot serve the purpose.
        """
        if self.adapter is None:
            raise UserError(f"The base has no adapter to {purpose}.")
        return self.adapter

    def pairs(self, purpose: str, than: str, remedy: str) -> dict[str, Pair]:
        """The updates by layer, scales multiplied into B.

        Raises:
            UserError: it wears nothing, or does more at some layer `than` the purpose allows.
        """
        pairs = {}
        for name, form in self.worn(purpose).low_rank().items():
            if form is None:
                raise UserError(f"'{self.name}' does more at {name} than {than}.", remedy=remedy)
            pairs[name] = form.A_RI.detach().cpu(), form.scale * form.B_OR.detach().cpu()
        return pairs

    @property
    def home(self) -> str:
        """What it is a persona of."""
        return self.base.name

    @property
    def context(self) -> int:
        """Tokens that it sees: more than the base where positions are stretched, fewer behind a prefix."""
        with self.on():
            return self.base.model.context

    def ask(self, conversation: Conversation, **sampling: Any) -> str:
        """Answer a question or a conversation. Keywords are those of `Sampling`, such as `temperature=0.7`."""
        return self.ask_all([conversation], **sampling)[0]

    def ask_all(self, conversations: Sequence[Conversation], **sampling: Any) -> list[str]:
        """Answer many conversations, several at a time."""
        return [answer.text for answer in self.answer_all(conversations, build(Sampling, sampling))]

    def answer_all(self, conversations: Sequence[Conversation], sampling: Sampling) -> list[Answer]:
        """Answer many conversations, and say of each answer whether it is whole."""
        prompts = [self.prompt(c) for c in conversations]
        with self.on():
            return complete(self.base.model, self.base.tokenizer, prompts, sampling)

    def stream(self, conversation: Conversation, sampling: Sampling,
               heard: Callable[[], bool] | None = None) -> Generator[str, None, bool]:  # fmt: skip
        """Answer piece by piece; `heard` is asked before each token, false stops. Returns whether it is whole."""
        with self.on():
            return (yield from stream(self.base.model, self.base.tokenizer, self.prompt(conversation), sampling, heard))

    def prompt(self, conversation: Conversation) -> list[int]:
        """The ids after which the model answers; a conversation without a system prompt gets the persona's own."""
        turns = addressed(self.system, conversation)
        return self.base.tokenizer.encode(self.base.tokenizer.chat(turns, prompt=True))

    def wearing(self, name: str, path: Path) -> "Persona":
        """The same base with the adapter of another file.

        Raises:
            UserError: no adapter, or one of another base.
        """
        adapter = adapters.load(path, self.base.model, self.base.fingerprint)
        return replace(self, name=name, adapter=adapter, system=adapters.read_header(path).system)


def addressed(system: str, said: Conversation) -> list[Message]:
    """The turns, begun with this system prompt, if there is one and they have none."""
    turns: list[Message] = [{"role": "user", "content": said}] if isinstance(said, str) else list(said)
    if not system or (turns and turns[0]["role"] == "system"):
        return turns
    return [{"role": "system", "content": system}, *turns]


def locate(name: str | None, folder: Path) -> tuple[str, Path]:
    """Find an adapter by the name of its run, or its file or folder: a name to show, and the file.

    Raises:
        UserError: there is none.
    """
    if name is not None:
        path = Path(name)
        if (path / "adapter.safetensors").exists():
            path = path / "adapter.safetensors"
        if path.is_file():
            inside = path.resolve().parent
            return inside.parent.name if inside.name == "adapter" else path.stem, path
    run = runs.find(name, folder, lambda run: run.adapter.exists())
    return run.name, run.adapter


def load_all(names: Sequence[str], runs_folder: Path = runs.RUNS, base: str | None = None, **how: Any) -> list[Persona]:
    """Load one base and several personas for it; without names, the newest run. `how` as for `load_base`.

    Raises:
        UserError: a persona is missing, or was made for another base.
    """
    found = [locate(name, runs_folder) for name in names] or [locate(None, runs_folder)]
    header = adapters.read_header(found[0][1])
    if base is None and Path(header.base).is_absolute() and not Path(header.base).exists():
        raise UserError("The base model is not where this adapter was trained on it.", where=header.base,
                        remedy="Say where it is now: --base PATH.")  # fmt: skip
    bare_base = Persona(BASE, load_base(base or header.base, base_format=header.base_format, **how))
    return [bare_base.wearing(name, path) for name, path in found]


def load_any(name: str, runs_folder: Path = runs.RUNS, base: str | None = None, **how: Any) -> Persona:
    """Load a persona by its run's name, folder or file, or a base model by its name or path.

    Raises:
        UserError: there is neither.
    """
    # A mistyped path such as runs/villag looks like a hub id too, and nothing is fetched for a slip of the finger.
    if source.is_model(name) or (source.is_hub_id(name) and not Path(name).parent.exists()):
        return Persona(BASE, load_base(name, **how))
    return load_all([name], runs_folder, base, **how)[0]


def load(name: str | None = None, runs: str | Path = runs.RUNS, base: str | None = None, **how: Any) -> Persona:
    """Load a persona by its run's name, folder or file; without a name, the newest. `how` as for `load_base`.

    Raises:
        UserError: there is none, or it was made for another base.
    """
    return load_all([] if name is None else [name], Path(runs), base, **how)[0]
