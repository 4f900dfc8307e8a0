"""Personas of a server elsewhere, asked as OpenAI's clients ask."""

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from deltaw.api.persona import BASE, Conversation, addressed
from deltaw.decode.sampling import Sampling
from deltaw.errors import UserError, nearest

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
        asked = {"model": self.model, "messages": addressed("", conversation), "stream": True,
                 "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
                 "min_p": sampling.min_p, "seed": sampling.seed, "repetition_penalty": sampling.repetition_penalty,
                 "max_tokens": sampling.max_new_tokens}  # fmt: skip
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
    base = next(iter(there.values()))
    return [there[name] for name in dict.fromkeys(names)] or [base, *(r for r in there.values() if r is not base)]


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""
