"""A conversation in which the answering persona may change at any turn: of a base that stays loaded, or of a server.

Personas of a server elsewhere are asked as OpenAI's clients ask.
"""

import json
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from deltaw.api.persona import BASE, Conversation, Persona, addressed
from deltaw.decode.sampling import Sampling
from deltaw.errors import UserError, explained, nearest
from deltaw.files.atomic import write_text
from deltaw.settings import plain

ANSWER_SECONDS = 600


@dataclass(frozen=True)
class Server:
    """Where it is, and the key that it asks for."""

    url: str
    key: str = ""

    def open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Ask; gives what it answers, to be read.

        Raises:
            UserError: nobody answers there, or what is asked is refused.
        """
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        try:
            return urlopen(Request(self.url.rstrip("/") + path, data, headers), timeout=ANSWER_SECONDS)
        except HTTPError as e:
            with closing(e):
                raise UserError(_message(e.read()) or f"{e.code} {e.reason}", where=self.url) from None
        except (OSError, HTTPException, ValueError) as e:
            raise UserError("No server answers here.", where=self.url, why=f"{e}.",
                            remedy="Start one: deltaw serve.") from None  # fmt: skip


@dataclass(frozen=True)
class Remote:
    """A persona there; `model`: its name there."""

    name: str
    model: str
    system: str
    server: Server

    @property
    def bare(self) -> bool:
        """Whether it is the base."""
        return self.name == BASE

    @property
    def home(self) -> str:
        """Where it is."""
        return self.server.url

    def stream(self, conversation: Conversation, sampling: Sampling,
               heard: Callable[[], bool] | None = None) -> Generator[str, None, bool]:  # fmt: skip
        """Answer piece by piece; `heard` is asked before each, false stops. Returns whether it is whole.

        Raises:
            UserError: the server refuses, or is gone.
        """
        drawn = plain(sampling)
        asked = {"model": self.model, "messages": addressed("", conversation), "stream": True,
                 "max_tokens": drawn.pop("max_new_tokens"), **drawn}  # fmt: skip
        with self.server.open("/v1/chat/completions", asked) as f:
            for line in f:
                if heard is not None and not heard():
                    return True
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise UserError(event["error"]["message"], where=self.home)
                    choice = event["choices"][0]
                    yield choice["delta"].get("content") or ""
                    if choice["finish_reason"] is not None:
                        return bool(choice["finish_reason"] == "stop")
        raise UserError("The answer broke off.", where=self.home)


def personas_of(url: str, names: Sequence[str] = (), key: str = "") -> list[Remote]:
    """The personas of a server, or those of these names; its base is the first, or the last of those that are named.

    Raises:
        UserError: nobody answers there, or there is no such persona.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError("This is no address of a server.", where=url, remedy="Take --url http://127.0.0.1:8000.")
    server = Server(url.rstrip("/").removesuffix("/v1"), key)
    with server.open("/v1/models") as f:
        cards = json.loads(f.read())["data"]
    there = {c["id"]: Remote(BASE if c.get("parent") is None else c["id"], c["id"], c.get("system") or "", server)
             for c in cards}  # fmt: skip
    if lost := next((name for name in names if name not in there), None):
        raise UserError(f"There is no persona '{lost}' there.", where=url, remedy=nearest(lost, there))
    return [there[name] for name in dict.fromkeys(names)] or list(there.values())


def _message(body: bytes) -> str:
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(body)["error"]["message"])
    return ""


class Chat:
    """Turns so far, the personas there are, and the one that answers next."""

    def __init__(self, personas: Sequence[Persona] | Sequence[Remote], sampling: Sampling) -> None:
        names = [BASE, *(p.name for p in personas if not p.bare)]
        if twice := next((n for n, times in Counter(names).items() if times > 1), None):
            raise UserError(f"Two personas are called '{twice}'.", remedy="Give the path of a file with another name.")
        first = personas[0]
        base = Persona(BASE, first.base) if isinstance(first, Persona) else Remote(BASE, BASE, "", first.server)
        self.personas: dict[str, Persona | Remote] = {BASE: base, **{p.name: p for p in personas}}
        self.current, self.sampling = personas[0].name, sampling
        self.turns: list[dict[str, str]] = []
        self.cut = False
        """Whether the last answer was cut at the longest length there was room for."""

    def switch(self, name: str) -> None:
        """Let another persona answer from now on.

        Raises:
            UserError: there is none of this name.
        """
        if name not in self.personas:
            raise UserError(f"There is no persona '{name}' here.", remedy=nearest(name, self.personas))
        self.current = name

    @property
    def begun(self) -> bool:
        """Whether anything was said."""
        return any(turn["role"] != "system" for turn in self.turns)

    def system(self, text: str) -> None:
        """Begin anew with this system prompt; an empty one gives every persona its own back."""
        self.turns = [{"role": "system", "content": text}] if text else []

    def ask(self, question: str, heard: Callable[[], bool] | None = None) -> Iterator[str]:
        """Answer piece by piece; whatever was said when `heard` turned false is kept as the answer."""
        asked = [*self.turns, {"role": "user", "content": question}]
        pieces, said, self.cut = self.personas[self.current].stream(asked, self.sampling, heard), "", False
        try:
            while True:
                said += (piece := next(pieces))
                yield piece
        except StopIteration as end:
            self.cut = not end.value
        finally:
            pieces.close()
            if said.strip():  # an empty answer teaches nothing, and no row may hold one
                self.turns = [*asked, {"role": "assistant", "content": said}]

    def retry(self) -> str | None:
        """Take the last answer and its question back; gives the question. What is drawn from now on is drawn anew."""
        if len(self.turns) < 2 or self.turns[-1]["role"] != "assistant":
            return None
        self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)
        question = self.turns[-2]["content"]
        self.turns = self.turns[:-2]
        return question

    def compare(self, question: str, heard: Callable[[], bool] = lambda: True) -> dict[str, str]:
        """The answers of the base and of every persona, after the same turns and with the same seed.

        When `heard` turns false, what was said so far is all.
        """
        asked = [*self.turns, {"role": "user", "content": question}]
        said = dict[str, str]()
        for name, persona in self.personas.items():
            if heard():
                try:
                    said[name] = "".join(persona.stream(asked, self.sampling, heard))
                except UserError as e:  # others can answer nevertheless
                    said[name] = str(e)
        return said

    def save(self, path: Path) -> int:
        """Add the conversation to a file of training rows; gives how many rows it has now.

        Raises:
            UserError: nothing was said yet.
        """
        if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in self.turns):
            raise UserError("There is no answer to save yet.")
        with explained("This file cannot be added to.", OSError, UnicodeDecodeError, where=path):
            before = path.read_text(encoding="utf-8") if path.exists() else ""
        if before and not before.endswith("\n"):
            before += "\n"
        turns = addressed(self.personas[self.current].system, self.turns)
        text = before + json.dumps({"messages": turns}, ensure_ascii=False) + "\n"
        with explained("The conversation cannot be saved here.", OSError, where=path, why="{error.strerror}."):
            write_text(path, text)
        return sum(bool(line.strip()) for line in text.split("\n"))
