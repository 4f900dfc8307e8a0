"""A conversation in which the answering persona may change at any turn; the base stays loaded."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from deltaw.api.persona import BASE, Persona, addressed
from deltaw.api.remote import Remote
from deltaw.decode.sampling import Sampling
from deltaw.errors import UserError, explained, nearest
from deltaw.files.atomic import write_text


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
