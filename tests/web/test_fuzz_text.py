"""Any text to tokens and any tokens to text, by themselves and over HTTP: nothing fails, nothing is made up."""

import json
import urllib.error
import urllib.request

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from web.hubs import running

from deltaw.api.persona import load_base
from deltaw.decode.generate import Speech
from deltaw.errors import UserError
from deltaw.models.tokenizer import Tokenizer

PATIENCE = 30
EXAMPLES = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
ODD = "<|im_start|>ednx\n\0\u200d\U0001f469é"
TEXTS = st.text(st.characters(exclude_categories=()), max_size=60) | st.text(ODD, max_size=40)
"""With halves of characters (surrogates), characters of many bytes, special tokens and pieces of them."""


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2", marks=pytest.mark.model)])
def tokenizer(request):
    return Tokenizer.load(request.getfixturevalue(f"{request.param}_path"))


@pytest.fixture(scope="module")
def url(tiny_path):
    with running(load_base(str(tiny_path), dtype="float32"), []) as (url, _):
        yield url


def told(url, path, body):
    """The status and what is answered; anything but JSON is a fault."""
    asked = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=PATIENCE) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


@EXAMPLES
@given(data=st.data())
def test_any_tokens_are_the_same_text_said_at_once_or_one_by_one(tokenizer, data):
    """Up to a stop string, of which none is said; and no piece is ever taken back."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.fast.get_vocab_size() - 1), max_size=40))
    whole = tokenizer.decode(ids, skip_special=True)
    inside = [whole[i : i + n] for i in range(len(whole)) for n in (1, 2, 5)]
    stops = data.draw(st.lists(st.text(min_size=1, max_size=3) | st.sampled_from(inside or ["a"]), max_size=3))
    speech, said = Speech(tokenizer, stops), ""
    for token in ids:
        said += speech.add(token)
        assert "\ufffd" not in said or "\ufffd" in whole
    said += speech.rest()
    assert whole.startswith(said)
    assert speech.stopped == any(stop in whole for stop in stops)
    assert not any(stop in said for stop in stops)
    assert whole[len(said) :].startswith(tuple(stops)) if speech.stopped else said == whole


@EXAMPLES
@given(text=TEXTS)
def test_any_text_has_tokens_of_the_vocabulary_and_comes_back(tokenizer, text):
    try:
        text.encode()
    except UnicodeError:
        with pytest.raises(UserError, match="half a character"):
            tokenizer.encode(text)
        return
    ids = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.fast.get_vocab_size() for token in ids)
    # SmolLM2's vocabulary lacks some bytes: control characters, and what begins characters that there are not.
    whole = len({*ByteLevel.alphabet()} - tokenizer.fast.get_vocab().keys()) <= 1
    assert not whole or tokenizer.decode(ids) == text


@EXAMPLES
@given(text=TEXTS)
def test_any_text_over_http_is_tokens_or_is_refused(url, text):
    status, answer = told(url, "/tokenize", {"prompt": text, "add_special_tokens": False})
    if status == 200:
        assert answer["count"] == len(answer["tokens"])
        assert told(url, "/detokenize", {"tokens": answer["tokens"]}) == (200, {"prompt": text})
    else:
        assert status == 400
        assert answer["error"]["message"].startswith("This text holds half a character")
        with pytest.raises(UnicodeError):
            text.encode()


@EXAMPLES
@given(tokens=st.lists(st.integers() | st.integers(0, 300) | st.floats() | st.text() | st.none(), max_size=12))
def test_any_numbers_over_http_are_a_text_or_are_refused(url, tokens):
    status, answer = told(url, "/detokenize", {"tokens": tokens})
    if all(isinstance(token, int) and 0 <= token < 260 for token in tokens):
        assert status == 200
    assert status in (200, 400)
    assert isinstance(answer["prompt"] if status == 200 else answer["error"]["message"], str)
