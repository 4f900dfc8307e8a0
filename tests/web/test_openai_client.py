"""What OpenAI's own client gets: the same texts as without a server, whole, in pieces, scored, held to a form."""

import concurrent.futures
import json
import re

import openai
import pytest
import torch
from oracles import our_logits

from deltaw.decode.sampling import Sampling
from deltaw.models import checkpoint
from deltaw.serve.catalog import BASE

QUESTION = [{"role": "user", "content": "say it"}]


def said(client, model, **more):
    told = client.chat.completions.create(
        model=model, messages=QUESTION, **{"temperature": 0, "max_tokens": 12, **more}
    )
    return told.choices[0]


def streamed(client, model, **more):
    return client.chat.completions.create(model=model, messages=QUESTION, stream=True, **more)


def test_everybody_is_listed_with_what_there_is_to_know(client, base):
    cards = {card.id: card for card in client.models.list()}
    assert set(cards) == {base.path.name, "poet", "chef", "second", "prefix", "whole", "pefted", "foreign", "broken"}
    poet = cards["poet"].model_dump()
    assert (poet["method"], poet["rank"], poet["system"], poet["parent"]) == (
        "lora",
        4,
        "You are a poet.",
        base.path.name,
    )
    assert cards["pefted"].model_dump()["rank"] == 3
    assert "another base" in cards["foreign"].fault
    assert "damaged" in cards["broken"].fault
    assert client.models.retrieve("chef").method == "dora"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


@pytest.mark.parametrize("name", ["base", "poet", "chef", "prefix", "whole"])
def test_a_persona_says_over_http_what_it_says_alone(client, personas, name):
    want = personas[name].answer_all([QUESTION], Sampling(max_new_tokens=12))[0]
    got = said(client, name)
    assert got.message.content == want.text
    assert got.finish_reason == ("stop" if want.whole else "length")
    pieces = list(streamed(client, name, temperature=0, max_tokens=12, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content for p in pieces if p.choices) == want.text
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == got.finish_reason
    assert pieces[-1].usage.prompt_tokens == len(personas[name].prompt(QUESTION))
    assert pieces[-1].usage.completion_tokens == 12 or want.whole


def test_a_card_says_what_an_adapter_is_once_it_was_worn(client, folder):
    for name, shares in (("chef", True), ("whole", False)):
        said(client, name)
        card = client.models.retrieve(name)
        assert (card.state, card.shares_batch) == ("ready", shares)
        assert card.bytes > 0
        assert len(card.hash) == 32


def test_a_persona_has_its_own_system_prompt_unless_there_is_one(client, personas):
    spoken = personas["poet"].base.tokenizer.chat(
        [{"role": "system", "content": "You are a poet."}, *QUESTION], prompt=True
    )
    told = client.completions.create(model="poet", prompt=spoken, temperature=0, max_tokens=12)
    assert told.choices[0].text == said(client, "poet").message.content
    other = [{"role": "system", "content": "Be brief."}, *QUESTION]
    told = client.chat.completions.create(model="poet", messages=other, temperature=0, max_tokens=12)
    want = personas["poet"].answer_all([other], Sampling(max_new_tokens=12))[0].text
    assert told.choices[0].message.content == want


def test_a_blend_is_the_weighted_sum(client, personas):
    """By the formula: W + 0.7 s B A of one, and 0.3 s B A of the other."""
    ids = personas["base"].prompt(QUESTION)

    def scores(model):
        told = client.completions.create(model=model, prompt=ids, max_tokens=1, logprobs=0, echo=True)
        return told.choices[0].logprobs.token_logprobs[1 : len(ids)]

    model = checkpoint.load(personas["base"].base.path)
    with torch.no_grad():
        for name, weight in (("poet", 0.7), ("second", 0.3)):
            for slot, form in personas[name].adapter.forms().items():
                model.get_submodule(slot).weight.w_OI.add_(form.B_OR @ form.A_RI, alpha=weight * form.scale)
        logp_TV = our_logits(model, ids).log_softmax(-1)
    want = [float(logp_TV[t, token]) for t, token in enumerate(ids[1:])]
    assert scores("poet:0.7+second:0.3") == pytest.approx(want, abs=1e-4)
    assert scores("second:.3+poet:0.7") == pytest.approx(want, abs=1e-4)
    assert scores("poet") != pytest.approx(want, abs=1e-3)
    assert scores("poet:0+chef:0") == pytest.approx(scores("base"), abs=1e-5)
    assert scores("poet:-1") != pytest.approx(scores("base"), abs=1e-3)


@pytest.mark.parametrize("name", ["base", "poet", "prefix"])
def test_echoed_prompts_have_the_scores_of_the_plain_forward(client, personas, name):
    """The way of lm-eval: lists of token ids, one token more, and whether each is the likeliest."""
    prompts = [[5, 6, 7, 8, 9, 10, 11], list(range(40, 110)), [3]]
    for _ in range(2):  # the second time their pages are known
        told = client.completions.create(
            model=name, prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
        )
        for prompt, choice in zip(prompts, told.choices, strict=True):
            with personas[name].on(), torch.no_grad():
                logp_TV = our_logits(personas[name].base.model, prompt).log_softmax(-1)
            scores = choice.logprobs
            assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == len(prompt) + 1
            assert scores.token_logprobs[0] is None
            want = [float(logp_TV[t, token]) for t, token in enumerate(prompt[1:])] + [float(logp_TV[-1].max())]
            assert scores.token_logprobs[1:] == pytest.approx(want, abs=1e-4)
            greedy = [
                p == max(top.values())
                for p, top in zip(scores.token_logprobs[1:], scores.top_logprobs[1:], strict=True)
            ]
            assert greedy[:-1] == [int(logp_TV[t].argmax()) == token for t, token in enumerate(prompt[1:])]
            assert greedy[-1]
            assert choice.text.startswith(personas["base"].base.tokenizer.decode(prompt))
    nothing = client.completions.create(model=name, prompt=prompts[0], max_tokens=0, logprobs=2, echo=True)
    assert len(nothing.choices[0].logprobs.tokens) == len(prompts[0])
    assert nothing.usage.completion_tokens == 0


def test_scores_of_a_chat_are_those_of_its_tokens(client):
    got = said(client, "poet", logprobs=True, top_logprobs=3)
    assert len(got.logprobs.content) == 12
    for each in got.logprobs.content:
        assert len(each.top_logprobs) == 3
        assert each.logprob == max(top.logprob for top in each.top_logprobs)  # greedy: it is the likeliest
        assert bytes(each.bytes).decode() == each.token
    pieces = streamed(client, "poet", temperature=0, max_tokens=12, logprobs=True, top_logprobs=0)
    scores = [each for p in pieces for each in (p.choices[0].logprobs.content if p.choices[0].logprobs else [])]
    assert [s.logprob for s in scores] == pytest.approx([s.logprob for s in got.logprobs.content])


def test_the_same_seed_says_the_same_whatever_else_is_asked(client):
    def drawn(seed, **more):
        return said(client, "poet", temperature=1.5, seed=seed, max_tokens=20, **more).message.content

    alone = [drawn(seed) for seed in range(4)]
    assert len({*alone}) == 4
    with concurrent.futures.ThreadPoolExecutor(12) as crowd:
        others = [crowd.submit(drawn, 100 + i) for i in range(8)]
        again = [*crowd.map(drawn, range(4))]
        assert all(other.result() for other in others)
    assert again == alone
    assert drawn(None) != drawn(None)


def test_many_answers_to_one_question_are_each_their_own(client):
    told = client.chat.completions.create(model="poet", messages=QUESTION, n=4, temperature=1.5, seed=3, max_tokens=16)
    texts = [choice.message.content for choice in told.choices]
    assert [choice.index for choice in told.choices] == [0, 1, 2, 3]
    assert len({*texts}) == 4
    assert texts[0] == said(client, "poet", temperature=1.5, seed=3, max_tokens=16).message.content
    assert told.usage.completion_tokens <= 64
    joined = ["", "", "", ""]
    for piece in streamed(client, "poet", n=4, temperature=1.5, seed=3, max_tokens=16):
        joined[piece.choices[0].index] += piece.choices[0].delta.content
    assert joined == texts


def test_stop_strings_end_an_answer_and_are_no_part_of_it(client):
    whole = said(client, "chef", max_tokens=60).message.content
    stop = whole[8:10]
    got = said(client, "chef", max_tokens=60, stop=[stop, "never said"])
    assert got.finish_reason == "stop"
    assert got.message.content == whole[: whole.index(stop)]
    longer = said(client, "chef", max_tokens=60, stop=stop, extra_body={"min_tokens": 40}).message.content
    assert len(longer) > len(got.message.content)
    assert whole.startswith(longer)


def test_ends_of_ones_own_no_end_and_not_before_so_many_tokens(client, personas):
    ids = personas["base"].prompt(QUESTION)
    free = client.completions.create(model="base", prompt=ids, temperature=0, max_tokens=8, logprobs=0).choices[0]
    tokenizer = personas["base"].base.tokenizer
    third = tokenizer.encode(free.logprobs.tokens[2])[0]
    more = {"stop_token_ids": [third]}
    cut = client.completions.create(model="base", prompt=ids, temperature=0, max_tokens=8, extra_body=more)
    at = free.logprobs.tokens.index(free.logprobs.tokens[2])
    assert cut.usage.completion_tokens == at
    assert cut.choices[0].finish_reason == "stop"
    later = client.completions.create(model="base", prompt=ids, temperature=0, max_tokens=8, logprobs=0,
                                      extra_body={**more, "min_tokens": 6})  # fmt: skip
    assert later.usage.completion_tokens >= 6
    assert third not in [tokenizer.encode(token)[0] for token in later.choices[0].logprobs.tokens[:6]]


def test_the_token_by_which_a_model_ends_is_not_said_and_has_a_score(client, personas):
    """Else lm-evaluation-harness, which leaves one generated token out, would leave out one of the prompt's."""
    ids, tokenizer = personas["base"].prompt(QUESTION), personas["base"].base.tokenizer
    asked = {"model": "base", "prompt": [ids], "temperature": 0, "logprobs": 1, "echo": True}
    free = client.completions.create(**asked, max_tokens=1).choices[0]
    first = tokenizer.encode(free.logprobs.tokens[-1])[0]
    for stream in (False, True):
        told = client.completions.create(**asked, max_tokens=1, stream=stream, extra_body={"stop_token_ids": [first]})
        choices = [piece.choices[0] for piece in told] if stream else told.choices
        assert [choice.finish_reason for choice in choices] == ["stop"]
        assert choices[0].logprobs.token_logprobs == free.logprobs.token_logprobs
        assert choices[0].text == tokenizer.decode(ids)


def test_penalties_and_cuts_change_what_is_said(client):
    plain = said(client, "base", max_tokens=40).message.content
    for more in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"extra_body": {"repetition_penalty": 5}}):
        assert said(client, "base", max_tokens=40, **more).message.content != plain, more
    for more in ({"extra_body": {"top_k": 1}}, {"top_p": 1e-6}, {"extra_body": {"min_p": 1}}):
        assert said(client, "base", max_tokens=40, temperature=2, seed=5, **more).message.content == plain, more
    assert said(client, "base", max_tokens=40, temperature=2, seed=5).message.content != plain


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "y"]}},
          "required": ["a", "b"], "additionalProperties": False}  # fmt: skip


def test_answers_are_held_to_a_form(client):
    form = {"type": "json_schema", "json_schema": {"name": "ab", "schema": SCHEMA, "strict": True}}
    for name in ("base", "poet"):
        got = said(client, name, max_tokens=60, response_format=form, temperature=1, seed=1)
        told = json.loads(got.message.content)
        assert got.finish_reason == "stop"
        assert set(told) == {"a", "b"}
        assert told["b"] in "xy"
    held = {"regex": r"[0-9]{3}-[a-c]+z", "choice": ["yes", "no"], "grammar": 'start: "<" /[a-z]{2}/ ">"'}
    for kind, told in held.items():
        got = said(
            client, "chef", max_tokens=60, temperature=1, seed=2, extra_body={"structured_outputs": {kind: told}}
        )
        text = got.message.content
        assert text in told if kind == "choice" else re.fullmatch(told if kind == "regex" else "<[a-z]{2}>", text), text
        assert got.finish_reason == "stop"
    got = said(client, "base", max_tokens=30, response_format={"type": "json_object"}, temperature=1, seed=4)
    assert got.message.content.lstrip().startswith("{")


@pytest.mark.parametrize(("body", "text"), [
    ({"model": "poett"}, "Did you mean 'poet'?"),
    ({"model": "poet:1+nobody:2"}, "no persona 'nobody' to blend"),
    ({"model": "poet:1+base:2"}, "no persona 'base' to blend"),
    ({"model": "poet:x"}, "'x' is no weight"),
    ({"model": "poet:"}, "'' is no weight"),
    ({"model": "poet:-"}, "'-' is no weight"),
    ({"model": "poet:\u0661"}, "is no weight"),
    ({"model": "+".join(["poet"] * 18)}, "no persona 'poet+poet' to blend"),
    ({"model": "foreign"}, "another base"),
    ({"model": "broken"}, "damaged"),
    ({"model": "prefix+poet:0.5", "extra_body": None}, None),
    ({"model": "prefix:0.5"}, "Only what is added to layers has a weight"),
    ({"model": "whole+poet"}, "cannot be blended"),
    ({"max_tokens": 5000}, "have no room"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n: "),
    ({"extra_body": {"max_token": 3}}, "no field 'max_token'. Did you mean 'max_tokens'?"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"top_logprobs": 2}, "top_logprobs: it goes with logprobs: true"),
    ({"messages": [{"role": "user"}]}, "messages.0.content: field required"),
    ({"messages": [{"role": "usr", "content": "a"}]}, "messages.0.role"),
    ({"extra_body": {"structured_outputs": {"regex": "("}}}, "unclosed group"),
    ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["a"]}}}, "one form only"),
    ({"extra_body": {"min_tokens": 9}, "max_tokens": 5}, "more than the answer may have"),
    ({"extra_body": {"stop_token_ids": [9999]}}, "no token 9999"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "image_url"),
    ({"response_format": {"type": "json_schema"}}, "json_schema"),
])  # fmt: skip
def test_mistakes_are_told_with_a_status(client, body, text):
    asked = {"model": "base", "messages": QUESTION, "max_tokens": 4, **{k: v for k, v in body.items() if v is not None}}
    for stream in (False, True):
        if text is None:
            assert client.chat.completions.create(**asked, stream=stream)
            continue
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as e:
            client.chat.completions.create(**asked, stream=stream)
        assert text in e.value.body["message"]
        assert e.value.status_code == (404 if any(word in text for word in ("persona", "'poet'", "no weight")) else 400)


def test_nothing_to_go_on_from_is_a_mistake(client):
    for prompt in ("", [], [[]], [[1], []], [999]):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=BASE, prompt=prompt, max_tokens=2)


def test_an_answer_is_sent_back_as_it_came_and_what_asks_for_nothing_may_be_sent(client):
    first = client.chat.completions.create(model="poet", messages=QUESTION, max_tokens=4, tools=[], tool_choice="none",
                                           logit_bias={}, metadata={"a": "b"}, store=False)  # fmt: skip
    turns = [*QUESTION, first.choices[0].message, {"role": "developer", "content": "Go on."}]
    again = client.chat.completions.create(model="poet", messages=turns, max_tokens=4)
    assert again.usage.prompt_tokens > first.usage.prompt_tokens + first.usage.completion_tokens
    assert client.completions.create(model="poet", prompt="a", max_tokens=1, best_of=1, suffix="")


def test_without_a_number_of_tokens_a_prefix_leaves_room_for_itself(client):
    assert said(client, "prefix", max_tokens=None, stop=["e"]).finish_reason in ("stop", "length")
