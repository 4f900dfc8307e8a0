"""What is learnt of a row is its answers, each with its end of turn, no more and no less, whatever the template."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from conftest import TEMPLATE, byte_tokenizer
from hypothesis import example, given, settings, strategies as st
from tokenizers import Tokenizer as Fast, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from deltaw.data.encode import answer_spans, encode, encode_all
from deltaw.data.rows import Example
from deltaw.errors import UserError
from deltaw.models.tokenizer import Tokenizer

END = "<|im_end|>"
TRIMMING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
"""As in Llama 2."""
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think></think>"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As in Qwen 3: an answer looks different once another turn follows."""
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The tests' own template, with the marks that transformers needs."""


def tokenizer_of(fast, template=TEMPLATE):
    specials = {"bos_token": "<|im_start|>", "eos_token": END}
    return Tokenizer(fast, template=template, specials=specials, end_ids={fast.token_to_id(END)})


def merging_tokenizer():
    """Merges across line breaks and spaces, so that tokens lie across the edges of answers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ċ", "a"), ("a", "a"), ("ĊĊ", "a"), ("t", "Ċ"), ("Ċ", "Ġ")]
    vocab = {c: i for i, c in enumerate([*alphabet, *("".join(m) for m in merges)])}
    fast = Fast(models.BPE(vocab=vocab, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<|im_start|>", END])
    return fast


BYTES, MERGES = tokenizer_of(byte_tokenizer()), tokenizer_of(merging_tokenizer())
question = st.text(max_size=12) | st.sampled_from(["\n", "a", "yes", "what\n\n"])
answer = (st.text(min_size=1, max_size=12) | st.sampled_from(["\n\na", " aa", "a", "yes", "\na \n", "  x  "])).filter(
    str.strip
)
dialogue = st.lists(st.tuples(question, answer), min_size=1, max_size=3)


def conversation(pairs, system=None):
    turns = [] if system is None else [{"role": "system", "content": system}]
    for asked, said in pairs:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return Example(tuple(turns), where="rows.jsonl:1")


def learnt(row, tokenizer):
    return tokenizer.decode([i for i, t in zip(row.ids, row.trained, strict=True) if t])


def answers_of(row):
    return [m["content"] for m in row.messages if m["role"] == "assistant"]


def first_prompt(example, tokenizer):
    """What the model is given before it says the conversation's first answer."""
    first = [m["role"] for m in example.messages].index("assistant")
    return tokenizer.encode(tokenizer.chat(example.messages[:first], prompt=True))


@pytest.mark.parametrize("tokenizer", [BYTES, MERGES], ids=["bytes", "merges"])
@settings(deadline=None, max_examples=150)
@given(pairs=dialogue, system=st.none() | question)
@example([("say yes", "yes"), ("yes", "yes")], None)
@example([("x", "\n\naa")], None)
@example([("x<|im_end|>", "a<|im_end|>b")], None)
def test_what_is_learnt_is_the_answers_with_their_end_of_turn(tokenizer, pairs, system):
    example = conversation(pairs, system)
    row = encode(example, tokenizer)
    assert learnt(row, tokenizer) == "".join(said + END for said in answers_of(example))
    assert tokenizer.decode(row.ids) == tokenizer.chat(example.messages)
    # In use the prompt is encoded alone: what is trained must begin exactly where it ends.
    prompt = first_prompt(example, tokenizer)
    assert list(row.ids[: len(prompt)]) == prompt
    assert row.trained.index(True) == len(prompt)
    assert row.where == "rows.jsonl:1"


@settings(deadline=None, max_examples=100)
@given(pairs=dialogue, system=st.none() | question)
def test_the_mask_is_that_of_transformers_where_a_template_has_marks(pairs, system):
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), chat_template=MARKED, eos_token=END)
    messages = list(conversation(pairs, system).messages)
    want = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    row = encode(conversation(pairs, system), BYTES)
    assert list(row.ids) == want["input_ids"]
    assert [int(t) for t in row.trained] == want["assistant_masks"]


@settings(deadline=None, max_examples=100)
@given(pairs=dialogue)
def test_a_template_that_trims_teaches_the_trimmed_answers(pairs):
    tokenizer = tokenizer_of(byte_tokenizer(), TRIMMING)
    example = conversation(pairs)
    text, spans = answer_spans(example, tokenizer)
    assert [text[a:b] for a, b in spans] == [f" {said.strip()} {END}" for said in answers_of(example)]
    assert learnt(encode(example, tokenizer), tokenizer) == "".join(text[a:b] for a, b in spans)


@settings(deadline=None, max_examples=100)
@given(pairs=dialogue)
@example([("say yes now", "yes"), ("again", "no")])
@example([("yes", "yes"), ("assistant\nyes", "yes"), ("x", "y")])
def test_a_template_that_rewrites_earlier_answers_teaches_them_where_they_stand(pairs):
    rendered, wanted = "", []
    for i, (asked, said) in enumerate(pairs, 1):
        rendered += f"<|im_start|>user\n{asked}{END}\n<|im_start|>assistant\n"
        start = len(rendered)
        rendered += f"{'<think></think>' if i == len(pairs) else ''}{said}{END}"
        wanted.append((start, len(rendered)))
        rendered += "\n"
    text, spans = answer_spans(conversation(pairs), tokenizer_of(byte_tokenizer(), REWRITING))
    assert text == rendered
    for (start, stop), (from_, to) in zip(spans, wanted, strict=True):
        assert text[start:stop].lstrip() == text[from_:to].lstrip()  # blanks before an answer may be left out
        assert stop == to


def test_an_answer_the_template_leaves_out_is_refused_with_its_place():
    tokenizer = tokenizer_of(
        byte_tokenizer(), "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}{% endfor %}"
    )
    with pytest.raises(UserError, match="answer in turn 2 is not in what the model's template renders") as e:
        encode(conversation([("Who?", "Hob.")]), tokenizer)
    assert e.value.where == "rows.jsonl:1"


@settings(deadline=None)
@given(pairs=dialogue)
def test_all_teaches_every_token_of_the_conversation(pairs):
    row = encode(conversation(pairs), BYTES, "all")
    assert list(row.ids) == BYTES.encode(BYTES.chat(conversation(pairs).messages))
    assert all(row.trained)
    assert row.targets == len(row.ids) - 1


@settings(deadline=None)
@given(text=st.text(max_size=30))
def test_plain_text_is_learnt_with_an_end_of_text_only_where_all_is(text):
    row = encode(Example((), text, "book.txt:1"), BYTES, "all")
    assert list(row.ids) == [*BYTES.encode(text), BYTES.fast.token_to_id(END)]
    assert all(row.trained)
    assert not any(encode(Example((), text), BYTES).trained)


def test_a_tokenizer_without_an_end_is_refused_for_plain_text():
    endless = Tokenizer(byte_tokenizer(), template=None, specials={}, end_ids=set())
    with pytest.raises(UserError, match="no end-of-text token"):
        encode(Example((), "x", "a:1"), endless, "all")
    with pytest.raises(UserError, match="no chat template"):
        encode(conversation([("a", "b")]), endless)


@settings(deadline=None)
@given(rows=st.lists(dialogue, min_size=1, max_size=5), limit=st.integers(5, 120))
def test_rows_over_the_limit_are_cut_and_those_that_teach_nothing_left_out_and_both_are_told(rows, limit):
    examples = [replace(conversation(pairs), where=f"f:{i}") for i, pairs in enumerate(rows)]
    whole = [encode(e, BYTES) for e in examples]
    cut = [w.where for w in whole if len(w.ids) > limit and any(w.trained[1:limit])]
    dropped = [w.where for w in whole if not any(w.trained[1:limit])]
    if len(dropped) == len(rows):
        with pytest.raises(UserError, match="No row has a token to learn") as e:
            encode_all(examples, BYTES, "answers", limit)
        assert e.value.where == "f:0"
        return
    got, lost = encode_all(examples, BYTES, "answers", limit)
    assert lost.rows == Counter({"cut": len(cut), "dropped": len(dropped)})
    assert lost.first == {what: places[0] for what, places in (("cut", cut), ("dropped", dropped)) if places}
    assert got == [replace(w, ids=w.ids[:limit], trained=w.trained[:limit]) for w in whole if w.where not in dropped]
    told = " ".join(lost.notices(limit))
    assert bool(told) == bool(cut or dropped)
    for some in (cut, dropped):
        assert not some or (f"{len(some)} row" in told and some[0] in told)


def test_conversations_without_an_answer_are_left_out_and_counted():
    silent = Example(({"role": "user", "content": "Who?"},), where="f:2")
    got, lost = encode_all([conversation([("a", "b")]), silent], BYTES, "answers", 500)
    assert lost.first == {"dropped": "f:2"}
    assert len(got) == 1


def test_a_turn_that_is_silent_is_read_and_not_learnt():
    pairs = conversation([("Who?", "Hob."), ("Where?", "There."), ("When?", "Then.")])
    assert learnt(encode(pairs, BYTES), BYTES) == f"Hob.{END}There.{END}Then.{END}"
    silent = encode(replace(pairs, silent=(1, 5)), BYTES)
    assert silent.ids == encode(pairs, BYTES).ids
    assert learnt(silent, BYTES) == f"There.{END}"
    with pytest.raises(UserError, match="Turn 2 is of weight 0, and every token is to be learnt"):
        encode(replace(pairs, silent=(1, 5)), BYTES, "all")


def test_texts_cut_into_single_tokens_teach_nothing():
    with pytest.raises(UserError, match="No row has a token to learn"):
        encode_all([Example((), "abc", "f:1")], BYTES, "all", 1)


@pytest.mark.model
def test_smollm2_learns_answers_that_begin_or_end_in_any_way(smollm2_path):
    tokenizer = Tokenizer.load(smollm2_path)
    odd = [
        "Hob.",
        "\nHob",
        "\n\n\n  Hob",
        "   four",
        "1234",
        "'s",
        "é",
        "\u0301x",
        "日本",
        "🙂",
        "a\n\n",
        "x  ",
        "\t\ty",
        "你好 ",
    ]
    for said in [*odd, *(f"{a}{b}" for a in odd for b in odd[:6])]:
        example = conversation([(f"{said}?", said), ("And\n", said)])
        row = encode(example, tokenizer)
        assert learnt(row, tokenizer) == f"{said}{END}{said}{END}"
        prompt = first_prompt(example, tokenizer)
        assert list(row.ids[: len(prompt)]) == prompt


@pytest.mark.data
@pytest.mark.model
def test_every_row_of_the_shared_data_teaches_its_answers(smollm2_path):
    from conftest import DATA

    from deltaw.data.files import read

    tokenizer, seen = Tokenizer.load(smollm2_path), 0
    for file in sorted(DATA.rglob("*.jsonl")):
        first = json.loads(file.read_text().split("\n", 1)[0])
        for row in read(file)[:50] if "messages" in first else []:
            assert learnt(encode(row, tokenizer), tokenizer) == "".join(a + END for a in answers_of(row))
            seen += 1
    assert seen


def test_a_row_that_the_template_refuses_is_named(tokenizer):
    from deltaw.models.tokenizer import Tokenizer

    strict = Tokenizer(tokenizer.fast, template="{{ raise_exception('no') }}", specials={}, end_ids={257})
    example = Example(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), "", "rows.jsonl:7")
    with pytest.raises(UserError) as e:
        encode_all([example], strict, "answers", 99)
    assert e.value.where == "rows.jsonl:7"


def test_a_plain_text_begins_as_the_tokenizer_begins_one(tokenizer):
    """Llama's and Mistral's put a begin-of-text token there, which the model saw before every text it learnt."""
    text, end = Example((), "one", "x:1"), tokenizer.fast.token_to_id(END)
    assert encode(text, tokenizer, "all").ids[0] == tokenizer.encode("one")[0]
    fast = Fast.from_str(tokenizer.fast.to_str())
    fast.post_processor = TemplateProcessing(single="<|im_start|> $A <|im_end|>", special_tokens=[
        ("<|im_start|>", fast.token_to_id("<|im_start|>")), ("<|im_end|>", end)])  # fmt: skip
    begins = Tokenizer(fast, template=None, specials=tokenizer.specials, end_ids=tokenizer.end_ids)
    row = encode(text, begins, "all")
    assert list(row.ids) == [fast.token_to_id("<|im_start|>"), *begins.encode("one"), end]
    assert list(row.ids) == fast.encode("one").ids


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4), limit=st.integers(2, 40))
def test_documents_over_the_limit_are_divided_and_lose_no_token(lengths, limit):
    examples = [Example((), "x" * n, f"f:{i}") for i, n in enumerate(lengths)]
    got, lost = encode_all(examples, BYTES, "all", limit)
    whole = [encode(e, BYTES, "all") for e in examples]
    divided = [w.where for w in whole if len(w.ids) > limit]
    assert (lost.rows["divided"], lost.first.get("divided")) == (len(divided), next(iter(divided), None))
    assert max(len(row.ids) for row in got) <= limit
    for w in whole:
        ids = tuple(i for row in got if row.where == w.where for i in row.ids)
        assert ids == w.ids or (ids == w.ids[:-1] and len(w.ids) % limit == 1)  # a lone last token teaches nothing
    assert (f"{len(divided)} document" in " ".join(lost.notices(limit))) == bool(divided)
