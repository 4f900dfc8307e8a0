"""A `Modelfile`, from which Ollama makes a model: the weights, how turns are written, where an answer stops.

Ollama's templates are Go's, a chat template is Jinja: so the latter is rendered, taken apart into what stands before
and after each turn, and put together again. What cannot be put together again is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from deltaw.errors import UserError, explained
from deltaw.models.tokenizer import Message, Tokenizer

MARKS = ("\ue000s\ue001", "\ue000u\ue001", "\ue000a\ue001", "\ue000v\ue001", "\ue000b\ue001")
"""Stand for a system prompt, a question, its answer, another question, another answer."""


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around the turns of a conversation."""

    begin: str
    """Where there is no system prompt."""
    system: tuple[str | None, str]
    """Around the system prompt; before is None where it stands in the first question (Gemma)."""
    before_user: str
    after_user: str
    """Up to where the answer begins."""
    after_answer: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Turns":
        """Take a model's template apart.

        Raises:
            UserError: it is not made of turns one after another.
        """
        said, asked, answered, again, other = MARKS
        plain = [_turn("user", asked), _turn("assistant", answered), _turn("user", again), _turn("assistant", other)]
        with explained("This chat template leaves something of a conversation out.", ValueError, why=""):
            start, after_user, middle, _, after_answer = _split(tokenizer.chat(plain), asked, answered, again, other)
            before, between, _, _, _, _ = _split(tokenizer.chat([_turn("system", said), *plain]), *MARKS)
        before_user = middle.removeprefix(after_answer)
        begin, folded = start.removesuffix(before_user), not between.endswith(before_user)
        system = (None if folded else before, between.removesuffix(before_user))
        made = cls(begin, system, before_user, after_user, after_answer)
        for talk in (plain[:1], plain[:3], [_turn("system", said), *plain[:1]], [_turn("system", said), *plain[:3]]):
            if made.written(talk) != tokenizer.chat(talk, prompt=True):
                raise UserError("This chat template does not write turns one after another, as Ollama's do.",
                                remedy="Take --to gguf: llama.cpp reads the template as it is.")  # fmt: skip
        return made

    def written(self, talk: Sequence[Message]) -> str:
        """A conversation up to where the next answer begins."""
        system = next((turn["content"] for turn in talk if turn["role"] == "system"), None)
        before, after = self.system
        text = self.begin if system is None or before is None else f"{before}{system}{after}"
        inside = f"{system}{after}" if system is not None and before is None else ""
        for turn in talk:
            if turn["role"] == "user":
                text += f"{self.before_user}{inside}{turn['content']}{self.after_user}"
                inside = ""
            elif turn["role"] == "assistant":
                text += f"{turn['content']}{self.after_answer}"
        return text

    def go(self, bos: str) -> str:
        """The same as a Go template, without the token that Ollama itself puts before everything."""
        begin, (before, after) = self.begin, self.system
        if begin.startswith(bos) and (before is None or before.startswith(bos)):
            begin, before = begin.removeprefix(bos), before and before.removeprefix(bos)
        if before is None:
            head = begin + "{{ $system := .System }}"
            inside = f'{{{{ if $system }}}}{{{{ $system }}}}{after}{{{{ $system = "" }}}}{{{{ end }}}}'
        else:
            head = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{begin}{{{{ end }}}}"
            inside = ""
        return (
            head + '{{ range .Messages }}{{ if eq .Role "user" }}'
            f"{self.before_user}{inside}{{{{ .Content }}}}{self.after_user}"
            '{{ else if eq .Role "assistant" }}'
            f"{{{{ .Content }}}}{self.after_answer}{{{{ end }}}}{{{{ end }}}}"
        )


def modelfile(tokenizer: Tokenizer, system: str, weights: str) -> str:
    """The text of a `Modelfile` beside the file of weights.

    Raises:
        UserError: the model's chat template cannot be written as Ollama's.
    """
    bos = tokenizer.specials.get("bos_token", "") if tokenizer.begin_ids else ""
    template = Turns.of(tokenizer).go(bos)
    if '"""' in template + system:
        raise UserError('Ollama\'s Modelfile cannot hold three quotation marks (""").')
    stops = [tokenizer.decode([i]) for i in sorted(tokenizer.end_ids)]
    lines = [f"FROM ./{weights}", f'TEMPLATE """{template}"""', *(f'PARAMETER stop "{stop}"' for stop in stops)]
    if system:
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n"


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _split(text: str, *marks: str) -> list[str]:
    """What stands before, between and after marks, each of which is there once."""
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            raise ValueError(mark)
        part, text = text.split(mark)
        parts.append(part)
    return [*parts, text]
