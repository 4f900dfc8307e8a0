"""Text to ids and back, and conversations to text by the model's own template.

Templates come with the model, so they run in Jinja's sandbox: they can format, and nothing else.
"""

import datetime
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Encoding, Tokenizer as Fast

from deltaw.errors import UserError, explained
from deltaw.models.gguf import GGUF

Message = Mapping[str, Any]
"""One turn: `{"role": "user", "content": "..."}`."""

SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token")
SPLIT_DIGITS = "smollm"
"""llama.cpp's name for GPT-2's word splitting after every digit was set apart; transformers leaves the digits out."""


class Tokenizer:
    """A byte-pair tokenizer with its special tokens and chat template."""

    def __init__(self, fast: Fast, *, template: str | None, specials: dict[str, str], end_ids: Iterable[Any]) -> None:
        self.fast, self.template, self.specials = fast, template, dict(specials)
        self.end_ids = {int(end) for end in end_ids if end is not None}
        self.now = datetime.datetime.now()
        """What templates that write the date are told; one moment, so that all rows of a run say the same."""
        self.fast.no_truncation()
        self.fast.no_padding()

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read the tokenizer of a model folder, or the one inside a GGUF file.

        Raises:
            UserError: there is none, or it is in a form that cannot be read.
        """
        # What reads it is foreign code, and may raise anything.
        with explained("The tokenizer's files cannot be understood.", Exception, where=path, why="{kind}: {error}"):
            if path.is_file():
                return _from_gguf(path)
            if not (path / "tokenizer.json").exists():
                return _from_transformers(path)
            config = _json(path / "tokenizer_config.json")
            template = config.get("chat_template")
            if (file := path / "chat_template.jinja").exists():
                template = file.read_text(encoding="utf-8")
            elif isinstance(template, list):  # several templates by name; the plain one is called "default"
                template = next((t["template"] for t in template if t["name"] == "default"), None)
            specials = {name: _content(config[name]) for name in SPECIALS if config.get(name)}
            with explained("tokenizer.json is damaged.", Exception, where=path):  # the library raises nothing narrower
                fast = Fast.from_file(str(path / "tokenizer.json"))
            said = (_json(path / "config.json") | _json(path / "generation_config.json")).get("eos_token_id")
            ends = [fast.token_to_id(specials.get("eos_token", "")), *(said if isinstance(said, list) else [said])]
            return cls(fast, template=template, specials=specials, end_ids=ends)

    @property
    def begin_ids(self) -> list[int]:
        """What this tokenizer puts before a plain text by itself: Llama's begin-of-text token, SmolLM2's nothing."""
        plain, whole = self.encode("a"), list(self.fast.encode("a", add_special_tokens=True).ids)
        return whole[: whole.index(plain[0])] if plain and plain[0] in whole else []

    def save(self, folder: Path) -> None:
        """Write files from which this class and `transformers` read the same tokenizer."""
        self.fast.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.specials, "clean_up_tokenization_spaces": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(self.end_ids)}) + "\n")
        if self.template is not None:
            (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of the text as it stands; special tokens are recognised, none is added."""
        return list(self._encoding(text).ids)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the characters `start, stop` of the text that it came from."""
        encoding = self._encoding(text)
        return list(encoding.ids), list(encoding.offsets)

    def _encoding(self, text: str) -> Encoding:
        with explained("This text holds half a character, or bytes that are no UTF-8.", TypeError,
                       why=lambda _: f"It begins {text[:40]!a}."):  # fmt: skip
            return self.fast.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of the ids."""
        return str(self.fast.decode(list(ids), skip_special_tokens=skip_special))

    def chat(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """Render a conversation; `prompt`: end with what comes before the assistant's next answer.

        Raises:
            UserError: the model has no template, or the template refuses the conversation.
        """
        if self.template is None:
            raise UserError("This model has no chat template.", remedy="Take an instruct model, or --train-on all.")
        tokens = {"bos_token": "", "eos_token": "", **self.specials}
        asked = {"messages": list(messages), "add_generation_prompt": prompt, "tools": None, "documents": None,
                 "strftime_now": self.now.strftime}  # fmt: skip
        # A template is foreign code, and may raise anything.
        with explained("The model's chat template refuses this conversation.", Exception,
                       remedy="Change the row, or the template in the model's folder."):  # fmt: skip
            return str(_compiled(self.template).render(asked | tokens))


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """The template in a sandbox with the helpers that templates on the hub rely on."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`: some templates mark answers so; here it renders what it holds."""

        tags = {"generation"}  # noqa: RUF012 (jinja's contract)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[loopcontrols, Generation])  # fmt: skip
    environment.filters["tojson"] = lambda value, **form: json.dumps(value, **{"ensure_ascii": False, **form})
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def _from_gguf(path: Path) -> Tokenizer:
    """The tokenizer inside a GGUF file, as `transformers` reads it."""
    gguf = GGUF(path)
    fast, specials = _read_by_transformers(path.parent, gguf_file=path.name)
    if gguf.field("tokenizer.ggml.pre") == SPLIT_DIGITS:
        from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence as InTurn

        fast.pre_tokenizer = InTurn([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    ends = [gguf.field(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot")]
    return Tokenizer(fast, template=gguf.field("tokenizer.chat_template"), specials=specials, end_ids=ends)


def _from_transformers(folder: Path) -> Tokenizer:
    """A tokenizer that exists only in SentencePiece or vocabulary files."""
    if not any((folder / name).exists() for name in ("tokenizer.model", "vocab.json")):
        raise UserError("There is no tokenizer in this model folder.", where=str(folder),
                        remedy="It needs tokenizer.json, or tokenizer.model.")  # fmt: skip
    fast, specials = _read_by_transformers(folder)
    template, ends = _json(folder / "tokenizer_config.json").get("chat_template"), [specials.get("eos_token", "")]
    return Tokenizer(fast, template=template, specials=specials, end_ids=map(fast.token_to_id, ends))


def _read_by_transformers(folder: Path, **options: str) -> tuple[Fast, dict[str, str]]:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    slow = AutoTokenizer.from_pretrained(str(folder), **options)
    specials = {name: str(getattr(slow, name)) for name in SPECIALS if getattr(slow, name, None)}
    return Fast.from_str(slow.backend_tokenizer.to_str()), specials


def _json(path: Path) -> dict[str, Any]:
    with explained("This is not a JSON object.", ValueError, where=path):
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _content(token: str | dict[str, Any]) -> str:
    return str(token["content"]) if isinstance(token, dict) else token
