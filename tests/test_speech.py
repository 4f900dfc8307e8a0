"""Text as it comes: whatever the pieces, together they are what all tokens say, up to a stop string."""

import pytest
from hypothesis import given, settings, strategies as st

from deltaw.decode.generate import Speech
from deltaw.models import source
from deltaw.models.tokenizer import Tokenizer

TEXTS = st.text(st.sampled_from("ab é漢🙂\n.</"), max_size=40)


def spoken(tokenizer, ids, stop=()):
    speech, pieces = Speech(tokenizer, stop), []
    for token in ids:
        pieces.append(speech.add(token))
        if speech.stopped:
            return pieces, True
    return [*pieces, speech.rest()], speech.stopped


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.lists(st.text(st.sampled_from("ab é<"), min_size=1, max_size=3), max_size=2))
def test_pieces_are_the_text_up_to_the_stop_string_that_is_whole_first(tokenizer, text, stop):
    pieces, stopped = spoken(tokenizer, tokenizer.encode(text), stop)
    ends = sorted((text.find(each) + len(each), text.find(each)) for each in stop if each in text)
    assert "".join(pieces) == text[: ends[0][1] if ends else len(text)]
    assert stopped == bool(ends)


def test_no_piece_has_half_a_character_and_every_byte_is_told(tokenizer):
    ids = tokenizer.encode("é🙂")
    assert len(ids) == 6
    assert spoken(tokenizer, ids)[0] == ["", "é", "", "", "", "🙂", ""]
    assert "".join(spoken(tokenizer, ids[:4])[0]) == tokenizer.decode(ids[:4])  # it ended within a character


def test_what_may_begin_a_stop_string_waits_until_it_does_not(tokenizer):
    pieces, stopped = spoken(tokenizer, tokenizer.encode("a<b</b>c"), ["</b>"])
    assert (pieces, stopped) == (["a", "", "<b", "", "", "", ""], True)
    assert spoken(tokenizer, tokenizer.encode("a</b"), ["</b>"]) == (["a", "", "", "", "</b"], False)


@pytest.mark.parametrize(
    "text", ["Hello, world! It's 5 o'clock — naïve 漢字 🙂🙂.\n\n  Indented\tcode()", "  two spaces first"]
)
def test_a_real_tokenizer_says_the_same_in_pieces(text):
    tokenizer = Tokenizer.load(source.find("smollm2-135m"))
    ids = tokenizer.encode(text)
    assert "".join(spoken(tokenizer, ids)[0]) == tokenizer.decode(ids) == text
    assert spoken(tokenizer, [*sorted(tokenizer.end_ids)[:1]])[0] == ["", ""]
