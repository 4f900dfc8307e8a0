"""Generation says what transformers says, alone or in a batch; the cache is the full pass; drawing follows its laws."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from oracles import our_logits, scramble
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deltaw.adapters.adapter import Adapter
from deltaw.data.batch import lay
from deltaw.data.encode import Encoded
from deltaw.decode import generate as loop
from deltaw.decode.generate import Answer, Cache, Prefill, complete, generate, stream
from deltaw.decode.sampling import Sampling, penalised, picks
from deltaw.errors import UserError
from deltaw.kernels.draw import Draw, likely
from deltaw.methods import method
from deltaw.models import checkpoint

END = 257
few = settings(deadline=None, max_examples=15)
prompts = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=10), min_size=1, max_size=5)


def answers(model, tokenizer, prompts, sampling):
    """Whole answers."""
    return [answer.text for answer in complete(model, tokenizer, prompts, sampling)]


def pick(logits_V, sampling, rng, asked, said):
    """The next token of one sequence."""
    return picks([logits_V], [sampling], [rng], [asked], [said])[0]


WARM = Sampling(max_new_tokens=12, temperature=1.0)


@pytest.fixture(scope="module")
def model(tiny_path):
    return checkpoint.load(tiny_path)


@pytest.fixture(scope="module")
def hf(tiny_path):
    return AutoModelForCausalLM.from_pretrained(tiny_path).eval()


def said(model, prompts, sampling, end_ids=frozenset(), heard=None):
    """Every prompt's answer."""
    out = [[] for _ in prompts]
    for step in generate(model, prompts, sampling, set(end_ids), heard):
        for i, token in step:
            out[i].append(token)
    return out


def theirs(hf, prompt, **options):
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "pad_token_id": 259, "eos_token_id": None, **options}
    return hf.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


@few
@given(prompts=prompts, begin=st.lists(st.integers(0, 255), max_size=8))
def test_greedy_answers_are_those_of_transformers_for_a_whole_batch(model, hf, prompts, begin):
    prompts = [*prompts, begin + prompts[0], begin + prompts[-1], prompts[0]]  # some begin alike, two are the same
    got = said(model, prompts, Sampling(max_new_tokens=12))
    assert got == [theirs(hf, p, max_new_tokens=12) for p in prompts]
    assert got == [said(model, [p], Sampling(max_new_tokens=12))[0] for p in prompts]


@few
@given(prompts=prompts, choose=st.integers(0, 11))
def test_an_answer_stops_before_the_first_end_token_and_the_others_go_on(model, hf, prompts, choose):
    whole = said(model, prompts, Sampling(max_new_tokens=12))
    ends = {whole[0][choose]}
    cut = [next((w[:i] for i, t in enumerate(w) if t in ends), w) for w in whole]
    assert said(model, prompts, Sampling(max_new_tokens=12), ends) == cut
    ended = theirs(hf, prompts[0], max_new_tokens=12, eos_token_id=list(ends))
    assert cut[0] == [t for t in ended if t not in ends]


@few
@given(prompts=prompts, new=st.lists(st.lists(st.integers(0, 255), min_size=5, max_size=5), min_size=1, max_size=6))
def test_the_cache_gives_what_the_full_forward_pass_gives(model, prompts, new):
    batch = lay([Encoded(tuple(p), (False,) * len(p)) for p in prompts])
    cache = Cache(model, batch.seen, [len(new)] * len(prompts))
    h_TD = model.hidden(batch.ids_T, batch.at_T, Prefill(cache, 0))[cache.last_tokens]
    texts, alive = [list(p) for p in prompts], list(range(len(prompts)))
    for step in new:
        for logits_V, row in zip(model.logits(h_TD), alive, strict=True):
            torch.testing.assert_close(logits_V, our_logits(model, texts[row])[-1], rtol=0, atol=2e-5)
        if len(alive) > 1:  # the first of them has ended
            cache.keep(torch.tensor(range(1, len(alive))))
            alive = alive[1:]
        for row in alive:
            texts[row].append(step[row % 5])
        seen = cache.next()
        h_TD = model.hidden(torch.tensor([texts[row][-1] for row in alive]), cache.lengths_B - 1, seen)


def test_an_adapter_that_is_worn_speaks_like_the_merged_model(tiny):
    adapter = scramble(Adapter.build(method("lora"), tiny).eval(), 0.1)
    asked = [[1, 2, 3], [1, 2, 9, 9], [5]]
    plain = said(tiny, asked, Sampling(max_new_tokens=15))
    with adapter.on():
        worn = said(tiny, asked, Sampling(max_new_tokens=15))
    adapter.merge()
    assert said(tiny, asked, Sampling(max_new_tokens=15)) == worn != plain


def test_nobody_speaks_on_when_nobody_is_heard(model):
    for steps in (1, 3):
        left = iter([True] * (steps - 1) + [False])
        got = said(model, [[1], [2, 3]], Sampling(max_new_tokens=12), heard=lambda left=left: next(left))
        assert got == [a[:steps] for a in said(model, [[1], [2, 3]], Sampling(max_new_tokens=12))]


def test_answers_come_in_the_order_of_the_prompts_however_many(model, tokenizer):
    asked = [list(range(1 + 7 * i % 50, 40 + i % 13)) or [3] for i in range(70)]
    got = answers(model, tokenizer, asked, Sampling(max_new_tokens=3))
    alone = [said(model, [p], Sampling(max_new_tokens=3), tokenizer.end_ids)[0] for p in asked]
    assert got == [tokenizer.decode(a, skip_special=True) for a in alone]
    assert answers(model, tokenizer, [], Sampling()) == []


def streamed(tokenizer, ids):
    """The pieces in which an answer of these ids is shown."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "generate", lambda *_: ([(0, i)] for i in ids))
        patch.setattr(loop, "room", lambda *_: 10**9)
        return list(stream(None, tokenizer, [1], Sampling()))


@settings(deadline=None)
@given(text=st.text(max_size=20), torn=st.lists(st.integers(0, 255), max_size=6))
def test_streamed_pieces_are_whole_characters_and_join_to_the_answer(tokenizer, text, torn):
    pieces = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    ids = [*tokenizer.encode(text), *torn]  # the last bytes need be no text at all
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_stream_is_the_answer(model, tokenizer):
    for seed in range(5):
        sampling = Sampling(max_new_tokens=20, temperature=1.5, seed=seed)
        (ids,) = said(model, [[1, 2]], sampling, tokenizer.end_ids)
        assert "".join(stream(model, tokenizer, [1, 2], sampling)) == tokenizer.decode(ids, skip_special=True)


def test_an_answer_says_whether_it_is_whole(model, tokenizer, monkeypatch):
    (ids,) = said(model, [[1, 2]], Sampling(max_new_tokens=6))
    monkeypatch.setattr(tokenizer, "end_ids", {ids[3]})
    at = ids.index(ids[3])
    for limit in range(1, 7):
        sampling = Sampling(max_new_tokens=limit)
        (answer,) = complete(model, tokenizer, [[1, 2]], sampling)
        assert answer == Answer(tokenizer.decode(ids[: min(at, limit)]), limit > at)
        assert returned(stream(model, tokenizer, [1, 2], sampling)) == (limit > at)


def returned(generator):
    """What a generator returns at its end."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def test_nothing_is_said_beyond_the_models_context(model, tokenizer):
    context = model.config.context
    long, short = [i % 200 for i in range(context - 3)], [1, 2]
    got = said(model, [long, short], Sampling(max_new_tokens=8))
    assert [len(answer) for answer in got] == [3, 8]
    assert got == [said(model, [p], Sampling(max_new_tokens=8))[0] for p in (long, short)]
    for length in (context, context + 1):
        with pytest.raises(UserError, match=f"{length} tokens long, and this model sees {context}"):
            said(model, [short, [1] * length], Sampling(max_new_tokens=8))


logits = st.integers(0, 10_000).map(lambda s: 3 * torch.randn(40, generator=torch.Generator().manual_seed(s)))
options = st.fixed_dictionaries({}, optional={"top_k": st.integers(1, 45), "top_p": st.floats(0.05, 0.99),
                                              "min_p": st.floats(0.001, 1)})  # fmt: skip


@settings(deadline=None)
@given(logits_V=logits, one=options.filter(lambda o: len(o) == 1))
def test_each_restriction_leaves_what_it_leaves_in_transformers(logits_V, one):
    ((name, value),) = one.items()
    warper = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}[name](value)
    want = warper(None, logits_V[None])[0].double().softmax(-1)
    torch.testing.assert_close(likely(logits_V, Draw(**one)), want, rtol=1e-5, atol=1e-7)


@settings(deadline=None)
@given(logits_V=logits, all_=options.filter(bool))
def test_restrictions_together_leave_what_each_of_them_leaves(logits_V, all_):
    p_V = likely(logits_V, Draw(**all_))
    left = torch.ones(40, dtype=torch.bool)
    for name, value in all_.items():
        left &= likely(logits_V, Draw(**{name: value})) > 0
    full_V = logits_V.double().softmax(-1) * left
    torch.testing.assert_close(p_V, full_V / full_V.sum())
    assert p_V[logits_V.argmax()] > 0


@pytest.mark.parametrize("vocab", [40, 50_000])
def test_without_restrictions_every_token_keeps_its_probability(vocab):
    logits_V = 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(161))
    torch.testing.assert_close(likely(logits_V, Draw()), logits_V.double().softmax(-1))


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits_V = torch.tensor([1.0, 2.0, 0.5, -1.0])
    rng, n = torch.Generator().manual_seed(0), 4_000
    for sampling in (
        Sampling(temperature=1.0),
        Sampling(temperature=2.0, top_k=3),
        Sampling(temperature=0.5, top_p=0.9),
    ):
        counts = torch.bincount(torch.tensor([pick(logits_V, sampling, rng, [], []) for _ in range(n)]), minlength=4)
        p_V = likely(logits_V, Draw(sampling.temperature, sampling.top_k, sampling.top_p))
        assert (counts[p_V == 0] == 0).all()
        assert ((counts / n - p_V).abs() <= 4 * (p_V * (1 - p_V) / n).sqrt()).all()


def test_a_draw_takes_one_number_of_its_stream_and_the_likeliest_none():
    logits_V = torch.arange(9.0)
    for way in ({}, {"top_k": 3}, {"top_p": 0.5, "min_p": 0.1}, {"frequency_penalty": 1.0}):
        rng, other = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
        pick(logits_V, Sampling(temperature=1.0, **way), rng, [1], [2])
        torch.rand((), dtype=torch.float64, generator=other)
        assert torch.equal(rng.get_state(), other.get_state())
        pick(logits_V, Sampling(**way), rng, [1], [2])
        assert torch.equal(rng.get_state(), other.get_state())


@few
@given(seeds=st.lists(st.integers(0, 99), min_size=1, max_size=6), where=st.integers(0, 5))
def test_rows_are_picked_together_as_each_is_alone(seeds, where):
    """Whatever stands beside it: the streams of all are their own."""
    ways = [{}, {"top_p": 0.5}, {"top_k": 2}, {"presence_penalty": 1}, {"temperature": 0}, {"repetition_penalty": 2}]
    asked, said = [[s % 40, 3] for s in seeds], [[s % 7] * (s % 3) for s in seeds]
    rows = [3 * torch.randn(40, generator=torch.Generator().manual_seed(s)) for s in seeds]
    samplings = [Sampling(**{"temperature": 1.0, **ways[(s + where) % 6]}) for s in seeds]
    streams = [[torch.Generator().manual_seed(s) for s in seeds] for _ in range(2)]
    for _ in range(3):
        alone = [pick(*each) for each in zip(rows, samplings, streams[0], asked, said, strict=True)]
        assert picks(torch.stack(rows), samplings, streams[1], asked, said) == alone


@few
@given(prompts=prompts, seed=st.integers(0, 9))
def test_drawing_from_the_likeliest_alone_is_greedy(model, prompts, seed):
    greedy = said(model, prompts, Sampling(max_new_tokens=12))
    for only in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert said(model, prompts, Sampling(max_new_tokens=12, temperature=1.0, seed=seed, **only)) == greedy


@few
@given(asked=prompts, others=prompts, seed=st.integers(0, 9))
def test_a_drawn_answer_depends_on_its_prompt_place_and_seed_and_on_no_other_prompt(model, asked, others, seed):
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=seed)
    got = said(model, asked, sampling)
    assert said(model, asked, sampling) == got
    assert said(model, asked + others, sampling)[: len(asked)] == got
    strangers = [others[i % len(others)] for i in range(len(asked) - 1)]
    assert said(model, [*strangers, asked[-1]], sampling)[-1] == got[-1]


def test_another_seed_draws_another_answer_and_equal_prompts_draw_their_own(model):
    one, two, three = said(model, [[1, 2, 3]] * 3, WARM)
    assert len({tuple(one), tuple(two), tuple(three)}) == 3
    assert said(model, [[1, 2, 3]], Sampling(max_new_tokens=12, temperature=1.0, seed=1))[0] != one


def test_drawn_answers_of_many_prompts_do_not_depend_on_the_lengths_of_the_others(model, tokenizer):
    first = answers(model, tokenizer, [[1, 2, 3], [4, 5], [9]], WARM)
    other = answers(model, tokenizer, [[1, 2, 3], [4, 5, 6, 7], [9]], WARM)
    assert (other[0], other[2]) == (first[0], first[2])
    same = answers(model, tokenizer, [[1, 2, 3]] * 40, WARM)
    assert len(set(same)) > 35


@settings(deadline=None)
@given(logits_V=logits, before=st.lists(st.integers(0, 39), max_size=30), penalty=st.floats(1.01, 3))
def test_the_repetition_penalty_is_that_of_transformers(logits_V, before, penalty):
    sampling = Sampling(repetition_penalty=penalty)
    want = logits_V
    if before:
        want = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([before]), logits_V[None].clone())[0]
    copy_V = logits_V.clone()
    for cut in (0, len(before) // 2, len(before)):  # whoever said it
        assert pick(logits_V, sampling, torch.Generator(), before[:cut], before[cut:]) == int(want.argmax())
        assert torch.equal(penalised(logits_V, sampling, before[:cut], before[cut:]), want)
    assert torch.equal(logits_V, copy_V)


@few
@given(prompts=prompts, penalty=st.floats(1.1, 2))
def test_a_penalised_answer_is_that_of_transformers(model, hf, prompts, penalty):
    got = said(model, prompts, Sampling(max_new_tokens=12, repetition_penalty=penalty))
    assert got == [theirs(hf, p, max_new_tokens=12, repetition_penalty=penalty) for p in prompts]


either = st.floats(-2, 2)
penalties = st.fixed_dictionaries({}, optional={"presence_penalty": either, "frequency_penalty": either,
                                                "repetition_penalty": st.floats(1, 2)})  # fmt: skip
spoken = st.lists(st.integers(0, 39), max_size=12)


@settings(deadline=None)
@given(logits_V=logits, asked=spoken, answer=spoken, which=penalties)
def test_what_the_answer_has_is_lowered_once_and_by_its_count_and_what_was_asked_is_not(logits_V, asked, answer, which):
    sampling = Sampling(**which)
    want, copy_V = logits_V.tolist(), logits_V.clone()
    for token in {*asked, *answer}:
        want[token] *= sampling.repetition_penalty ** (-1 if want[token] > 0 else 1)
    for token in set(answer):
        want[token] -= sampling.presence_penalty + sampling.frequency_penalty * answer.count(token)
    got_V = penalised(logits_V, sampling, asked, answer)
    torch.testing.assert_close(got_V, torch.tensor(want), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits_V, copy_V)
    assert sampling.penalises != all(v == (n[0] == "r") for n, v in which.items())
    if not sampling.penalises or not (asked or answer):
        assert got_V is logits_V


def test_a_small_penalty_counts_where_logits_are_bfloat16():
    logits_V = torch.tensor([20.0, 20.0, -9.0], dtype=torch.bfloat16)
    less = Sampling(frequency_penalty=0.01)
    assert [pick(logits_V, less, torch.Generator(), [0], said) for said in ([], [0], [0, 1], [0, 0, 1])] == [0, 1, 0, 1]
    assert picks([logits_V] * 2, [less, Sampling()], [torch.Generator()] * 2, [[]] * 2, [[0], [0]]) == [1, 0]


@few
@given(prompts=prompts, which=penalties)
def test_an_answer_is_penalised_for_what_it_said_itself(model, prompts, which):
    sampling = Sampling(max_new_tokens=8, **which)
    for prompt, answer in zip(prompts, said(model, prompts, sampling), strict=True):
        for i, token in enumerate(answer):
            logits_V = penalised(our_logits(model, [*prompt, *answer[:i]])[-1], sampling, prompt, answer[:i])
            assert logits_V[token] > logits_V.max() - 1e-4


def test_an_answer_that_is_no_number_is_refused(tiny):
    adapter = Adapter.build(method("lora"), tiny).eval()
    with torch.no_grad():
        next(adapter.parameters()).fill_(torch.nan)
    for sampling in (Sampling(), WARM):
        with adapter.on(), pytest.raises(UserError, match="no number"):
            said(tiny, [[1, 2, 3], [4]], sampling)
