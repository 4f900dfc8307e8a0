"""Answers that must be JSON of a schema, or match a regular expression or a grammar, by way of llguidance."""

import json
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from deltaw.errors import UserError
from deltaw.models.tokenizer import Tokenizer

Kind = Literal["json", "regex", "choice", "grammar"]
"""A JSON schema, a regular expression, a list of texts, or a grammar in Lark's form."""


class Grammars:
    """Grammars over one model's vocabulary of so many tokens."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary

    @cached_property
    def words(self) -> Any:
        """The vocabulary as the library has it, which takes a second."""
        from llguidance import LLTokenizer

        ends = sorted(self.tokenizer.end_ids)
        return LLTokenizer(self.tokenizer.fast.to_str(), n_vocab=self.vocabulary, eos_token=ends or None)

    def of(self, kind: Kind, told: Any) -> "Matcher":
        """A grammar.

        Raises:
            UserError: it is none.
        """
        from llguidance import LLMatcher

        if kind == "json":
            text = LLMatcher.grammar_from_json_schema(told if isinstance(told, str) else json.dumps(told))
        elif kind == "regex":
            text = LLMatcher.grammar_from_regex(told)
        else:
            told = told if kind == "grammar" else "start: " + " | ".join(json.dumps(each) for each in told)
            text = LLMatcher.grammar_from_lark(told)
        matcher = LLMatcher(self.words, text, log_level=0)
        if matcher.is_error():
            raise UserError(f"This {kind} says nothing that an answer can be held to.", why=matcher.get_error())
        return Matcher(matcher, self.vocabulary)


class Matcher:
    """One answer on its way through a grammar: after each token, which may follow."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self.matcher, self.vocabulary = matcher, vocabulary

    def allowed(self) -> Tensor:
        """V booleans."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, count=self.vocabulary, bitorder="little")).bool()

    def take(self, token: int) -> bool:
        """Go on to the next; returns whether anything may follow."""
        self.matcher.consume_token(token)
        return not self.matcher.is_stopped()
