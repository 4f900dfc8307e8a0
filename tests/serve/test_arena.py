"""The pages of a server: each in one place, known by what its tokens saw, and given up with its memory."""

import psutil
import pytest
import torch
from serve.integrity import check_arena

from deltaw.kernels.attention import SIDE
from deltaw.serve.arena import Arena, Full, names


@pytest.fixture
def arena(tiny):
    probe = Arena(tiny, 0)
    assert probe.count == 1
    return Arena(tiny, 5 * probe.page_bytes + 3)


def test_a_page_has_the_keys_and_values_of_some_tokens_in_all_layers(arena, tiny):
    c = tiny.config
    assert arena.page_bytes == SIDE * c.layers * 2 * c.kv_heads * c.head_width * 4
    assert (arena.count, arena.available, len(arena.books)) == (5, 5, c.layers)
    put = [torch.randn(2, SIDE, c.kv_heads, c.head_width) for _ in arena.books]
    for book, (k, v) in zip(arena.books, put, strict=True):
        book.write(torch.tensor([3]), 0, k, v)
    for book, pair in zip(arena.books, put, strict=True):
        assert all(map(torch.equal, book.read(torch.tensor([3]), SIDE), pair))
    assert not arena.pages[[0, 1, 2, 4]].any()


def test_pages_are_taken_held_and_dropped(arena):
    pages = [arena.take() for _ in range(5)]
    assert sorted(pages) == list(range(5))
    with pytest.raises(Full):
        arena.take()
    arena.hold(pages[0])
    arena.drop(pages[0])
    assert arena.available == 0
    for page in pages:
        arena.drop(page)
    assert arena.available == 5
    check_arena(arena)


def test_a_page_that_is_known_stays_until_its_room_is_needed_the_longest_unused_first(arena):
    ids = list(range(3 * SIDE))
    pages = [arena.take() for _ in range(3)]
    for page, name in zip(pages, names(b"mine", ids), strict=True):
        arena.learn(page, name)
    for page in reversed(pages):
        arena.drop(page)
    assert arena.available == 5
    assert list(arena.find(b"mine", ids)) == pages
    assert list(arena.find(b"mine", [*ids[: 2 * SIDE], *ids[:SIDE]])) == pages[:2]
    assert list(arena.find(b"other", ids)) == []
    assert list(arena.find(b"mine", ids[: SIDE - 1])) == []
    others = [arena.take() for _ in range(3)]
    check_arena(arena)
    assert list(arena.find(b"mine", ids)) == pages[:2]  # the end of a beginning went first
    assert pages[2] in others
    arena.hold(pages[0])
    assert arena.available == 1
    arena.take()
    check_arena(arena)
    assert list(arena.find(b"mine", ids)) == pages[:1]


def test_a_second_page_of_the_same_tokens_has_no_name(arena):
    first, second = arena.take(), arena.take()
    (name,) = names(b"x", range(SIDE))
    arena.learn(first, name)
    arena.learn(second, name)
    arena.drop(second)
    arena.drop(first)
    assert list(arena.find(b"x", range(SIDE))) == [first]
    check_arena(arena)


def test_names_tell_every_token_and_what_is_worn():
    ids = list(range(2 * SIDE))
    some = list(names(b"a", ids))
    changed = [*ids[:3], 99, *ids[4:]]
    assert len({*some, *names(b"b", ids), *names(b"a", changed)}) == 6
    assert next(names(b"a", [*ids[:SIDE], *ids[:SIDE]])) == some[0]
    assert len(list(names(b"a", ids[:-1]))) == 1


def test_pages_that_are_given_up_give_their_memory_to_the_machine(tiny):
    big = Arena(tiny, 64 << 20)
    held = psutil.Process().memory_info().rss
    big.pages.fill_(1)
    full = psutil.Process().memory_info().rss
    assert full - held > 60 << 20
    given = big.give(48 << 20)
    assert len(given) == -(-(48 << 20) // big.page_bytes)
    assert full - psutil.Process().memory_info().rss > 40 << 20
    assert not big.pages[given].any()
    kept = [page for page in range(big.count) if page not in given]
    assert bool((big.pages[kept] == 1).all())
    check_arena(big)
    assert big.give(48 << 20) == []
    assert big.available == len(kept)
    big.back(given)
    assert big.available == big.count
    check_arena(big)
