"""Tokens as text, piece by piece: whole characters only, and nothing of what may turn out to be a stop string."""

from collections.abc import Sequence

from deltaw.models.tokenizer import Tokenizer

PARTIAL = "\ufffd"
"""What the bytes of half a character decode to."""


class Speech:
    """One answer. A stop string behind its `least` tokens ends it, and is not a part of it."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), least: int = 0) -> None:
        self.tokenizer, self.stop, self.least = tokenizer, [each for each in stop if each], least
        self.ids: list[int] = []
        self.context, self.read = 0, 0
        """Where the tokens begin that the next ones are decoded with, and how many are told in `held` or before."""
        self.held = ""
        """What may be the beginning of a stop string."""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take one more token; returns the text that is certain by now."""
        self.ids.append(token)
        return self._told(whole=False)

    def rest(self) -> str:
        """What is left when there are no more tokens."""
        return self._told(whole=True)

    def _told(self, whole: bool) -> str:
        if self.stopped:
            return ""
        # With some tokens before them, as how a token is written may depend on whether it is the first.
        before = self.tokenizer.decode(self.ids[self.context : self.read], skip_special=True)
        after = self.tokenizer.decode(self.ids[self.context :], skip_special=True)
        if whole or (len(after) > len(before) and not after.endswith(PARTIAL)):
            self.held += after[len(before) :]
            self.context, self.read = self.read, len(self.ids)
        stop = self.stop if len(self.ids) + whole > self.least else []
        ends = [at for each in stop if (at := self.held.find(each)) >= 0]
        if ends:
            self.stopped, told = True, self.held[: min(ends)]
        else:
            told = self.held if whole else self.held[: len(self.held) - self._maybe(stop)]
        self.held = self.held[len(told) :]
        return told

    def _maybe(self, stop: Sequence[str]) -> int:
        """How many characters at the end begin a stop string."""
        lengths = (n for each in stop for n in range(len(each) - 1, 0, -1) if self.held.endswith(each[:n]))
        return max(lengths, default=0)
