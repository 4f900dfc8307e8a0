"""Native code draws the token that torch's way draws by the same number, and both draw what arithmetic by hand says."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from scipy.stats import chisquare

from deltaw.kernels import draw as kernel, library
from deltaw.kernels.draw import Draw, drawn, likely

ROUNDED = 1e-6
"""How far from a bound a number may be, for sums in fp32 to find it on the other side."""
LARGEST = 1 - 2**-53
each_set = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
draws = st.builds(
    Draw, temperature=st.sampled_from([0.0, 1e-3, 0.3, 1.0, 1.7, 50.0]), top_k=st.sampled_from([0, 1, 3, 20, 300, 999]),
    top_p=st.sampled_from([1.0, 1e-9, 0.3, 0.5, 0.95, 0.999]), min_p=st.sampled_from([0.0, 1e-4, 0.3, 1.0]),
    number=st.floats(0, 1, exclude_max=True),
)  # fmt: skip


def reference(logits_V, draw):
    return kernel._drawn(logits_V, draw)


def logits(width, seed, kind="", size=3.0):
    z_V = size * torch.randn(width, generator=torch.Generator().manual_seed(seed))
    if kind == "equals":
        z_V = z_V.round()
    if kind == "unsayable":
        z_V[::3], z_V[-1] = -torch.inf, 1.0
    return z_V.bfloat16() if kind == "bf16" else z_V


def nearby(logits_V, draw):
    """What the reference draws by numbers and bounds that are rounding away."""
    numbers = [min(max(draw.number + off, 0), LARGEST) for off in (-ROUNDED, 0, ROUNDED)]
    bounds = [1.0] if draw.top_p == 1 else [max(draw.top_p + off, 1e-12) for off in (-ROUNDED, 0, ROUNDED)]
    return {reference(logits_V, draw._replace(number=u, top_p=p)) for u in numbers for p in bounds}


@pytest.mark.parametrize("kind", ["", "equals", "unsayable", "bf16"])
def test_the_token_is_that_of_the_reference(path, kind):
    drew, others = 0, 0
    for width in (1, 2, 5, 16, 40, 255, 256, 257, 1003, 5000):
        for i, size in enumerate((0.1, 1.0, 3.0, 8.0)):
            z_V = logits(width, i, kind, size)
            rng = torch.Generator().manual_seed(width + i)
            ways = itertools.product((0.3, 1.0, 2.0), (0, 20, 600), (1.0, 0.5, 0.97), (0.0, 0.1))
            hows = [Draw(*way, float(torch.rand((), dtype=torch.float64, generator=rng))) for way in ways]
            for how, got in zip(hows, drawn([z_V] * len(hows), hows), strict=True):
                drew += 1
                if got != reference(z_V, how):
                    others += 1
                    assert got in nearby(z_V, how), how
    assert others <= 4, f"{others} of {drew}"


@pytest.mark.parametrize("how", [Draw(), Draw(top_p=0.95), Draw(top_k=50), Draw(min_p=0.02), Draw(0.7, 400, 0.9)])
def test_of_a_whole_vocabulary_too(path, how):
    rows = [logits(49_152, i, ("", "bf16")[i % 2], size) for i, size in enumerate((1.0, 1.0, 2.5, 2.5, 5.0, 5.0))]
    numbers = torch.rand(len(rows), dtype=torch.float64, generator=torch.Generator().manual_seed(1)).tolist()
    hows = [how._replace(number=u) for u in numbers]
    for z_V, one, got in zip(rows, hows, drawn(rows, hows), strict=True):
        assert got == reference(z_V, one) or got in nearby(z_V, one)


def by_hand(z, how):
    """The kept ids and their shares, one token at a time in fp64."""
    top = max(z)
    w = [math.exp((x - top) / how.temperature) for x in z]
    kept, before = [], 0.0
    for rank, i in enumerate(sorted(range(len(z)), key=lambda i: (-z[i], i))):
        cut = (how.top_k and rank >= how.top_k) or (how.top_p < 1 and before >= how.top_p) or w[i] < how.min_p
        kept += [] if cut else [i]
        before += w[i] / sum(w)
    return sorted(kept), [w[i] / sum(w[j] for j in kept) for i in sorted(kept)]


@pytest.mark.parametrize("name", [library.REFERENCE, *library.available()[:-1]])
@each_set
@given(z=st.lists(st.integers(-12, 12).map(lambda i: i / 4), min_size=1, max_size=9), how=draws)
def test_every_number_draws_the_token_whose_share_it_falls_into(choose, name, z, how):
    """By the middle of each kept token's share. Quarters are exact in every type, and often equal."""
    choose(name)
    how = how._replace(temperature=max(how.temperature, 0.25), top_p=min(how.top_p, 1.0))
    kept, shares = by_hand(z, how)
    kept_other = [by_hand(z, how._replace(top_p=how.top_p + off))[0] for off in (-1e-7, 1e-7) if how.top_p < 1]
    if any(other != kept for other in kept_other):
        return  # a bound that is met to the last bit: both sides of it are right
    for z_V in (torch.tensor(z), torch.tensor(z).bfloat16(), torch.tensor(z).double()):
        p_V = likely(z_V, how)
        assert p_V.nonzero()[:, 0].tolist() == kept
        torch.testing.assert_close(p_V[kept], torch.tensor(shares, dtype=torch.float64))
        below = 0.0
        for token, share in zip(kept, shares, strict=True):
            assert drawn([z_V], [how._replace(number=below + share / 2)]) == [token] or share < 1e-5
            below += share


@pytest.mark.parametrize("how", [Draw(), Draw(2.0, top_k=7), Draw(0.5, top_p=0.9), Draw(1.5, min_p=0.1)], ids=str)
def test_tokens_are_drawn_as_often_as_they_are_likely(path, how):
    z_V, n = logits(12, 3, size=1.0), 20_000
    numbers = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).tolist()
    counts = torch.bincount(torch.tensor(drawn([z_V] * n, [how._replace(number=u) for u in numbers])), minlength=12)
    p_V = likely(z_V, how)
    assert not counts[p_V == 0].any()
    assert chisquare(counts[p_V > 0].numpy(), n * p_V[p_V > 0].numpy()).pvalue > 1e-3


@each_set
@given(how=draws, seed=st.integers(0, 99), width=st.sampled_from([1, 7, 300, 900]),
       kind=st.sampled_from(["", "equals", "unsayable", "bf16"]), more=st.floats(0, 1))  # fmt: skip
def test_laws(path, how, seed, width, kind, more):
    z_V = logits(width, seed, kind)
    (token,) = drawn([z_V], [how])
    assert z_V[token] > -torch.inf
    most = int(z_V.argmax())
    only = [how._replace(**one) for one in ({"top_k": 1}, {"top_p": 1e-30}, {"temperature": 0.0})]
    assert drawn([z_V] * 3, only) == [most] * 3
    if how.temperature:
        wider = how._replace(top_p=min(1.0, how.top_p * (1 + ROUNDED) + more * (1 - how.top_p)))
        kept_V = likely(z_V, wider) > 0
        assert kept_V[token]
        assert kept_V[likely(z_V, how) > 0].all()
        ends = drawn([z_V] * 2, [how._replace(number=0.0), how._replace(number=LARGEST)])
        assert ends[0] <= token <= ends[1]
    company = [logits(width, seed + 1), z_V, logits(width, seed + 2, "bf16")]
    assert drawn(company, [Draw(number=0.3), how, Draw(top_p=0.5, number=0.9)])[1] == token


def test_of_equals_the_lower_ids_are_kept(path):
    for width in (5, 300, 5000):
        z_V = torch.ones(width)
        hows = [Draw(top_k=3, number=u) for u in (0.0, 0.5, LARGEST)] + [Draw(top_p=0.5, number=LARGEST)]
        assert drawn([z_V] * 4, hows) == [0, 1, 2, (width - 1) // 2]
        z_V[3] = 1.5
        assert drawn([z_V] * 3, hows[:3]) == [0, 1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [3, 40, 700])
def test_what_is_no_number_draws_nothing_and_disturbs_nobody(path, dtype, width):
    good = logits(width, 1).to(dtype)
    empty, odd, above = torch.full_like(good, -torch.inf), good.clone(), good.clone()
    odd[1], above[2] = torch.nan, torch.inf
    for how in (Draw(number=0.4), Draw(top_p=0.9, number=0.4), Draw(top_k=2, number=0.4), Draw(0.0)):
        want = reference(good, how)
        assert drawn([good, empty, odd, above, good], [how] * 5) == [want, -1, -1, -1, want]
        assert [reference(z_V, how) for z_V in (empty, odd, above)] == [-1] * 3
        first = torch.full_like(good, -torch.inf)
        first[width - 1] = -5
        assert drawn([first], [how]) == [width - 1]


@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 1e30, 1e300])
def test_numbers_at_the_ends_of_what_there_is(path, temperature):
    z_V = torch.tensor([3e38, -3e38, 3e38, 0.0, -torch.inf] * 3)
    for way in ({}, {"top_p": 0.9}, {"top_k": 9}, {"min_p": 0.5}):
        for number in (0.0, 0.5, LARGEST):
            (token,) = drawn([z_V], [Draw(temperature, number=number, **way)])
            assert z_V[token] > (-torch.inf if temperature > 1 else 1e38)


def test_whatever_the_threads(path):
    rows = [logits(3000, i) for i in range(9)]
    hows = [Draw(top_p=(1.0, 0.8)[i % 2], number=i / 9) for i in range(9)]
    before, got = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got.append(drawn(rows, hows))
    finally:
        torch.set_num_threads(before)
    assert got[0] == got[1] == got[2] == [drawn([z_V], [how])[0] for z_V, how in zip(rows, hows, strict=True)]
    assert drawn([], []) == []


@pytest.mark.parametrize("name", [library.REFERENCE, *library.available()])
def test_what_native_code_does_not_know_torch_does(name, choose):
    choose(name)
    z_V, how = logits(40, 5), Draw(0.8, 20, 0.9, 0.01, 0.6)
    want = drawn([z_V], [how])
    assert drawn([z_V.double()], [how]) == drawn([torch.stack((z_V, z_V), 1)[:, 1]], [how]) == want
