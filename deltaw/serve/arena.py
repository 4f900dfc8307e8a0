"""One budget of memory for keys, values and adapters, in pages (S-LoRA's unified paging, arXiv:2311.03285, section 5).

A page has the keys and values of SIDE tokens in all layers. One that is full stays known by all that its tokens saw:
what was worn, and every token up to its last. So sequences that begin alike share pages, and adapters that changed
under an old name share none. Pages of nobody are given back to the machine when an adapter takes their room.
"""

import ctypes
import hashlib
import mmap
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence

import torch

from deltaw.kernels.attention import SIDE, Book
from deltaw.models.decoder import Decoder
from deltaw.models.slots import Before


class Full(Exception):
    """No page is to be had."""


class Arena:
    """Pages for `budget_bytes`: free, held by sequences, known but held by nobody, or given up for adapters."""

    def __init__(self, model: Decoder, budget_bytes: int) -> None:
        c = model.config
        numbers = c.layers * 2 * c.kv_heads * SIDE * c.head_width
        self.page_bytes = numbers * model.dtype.itemsize
        self.count = max(1, budget_bytes // self.page_bytes)
        self.memory = _memory(self.count * self.page_bytes)
        shape = self.count, c.layers, 2 * c.kv_heads, SIDE * c.head_width
        self.pages = torch.frombuffer(self.memory, dtype=model.dtype).view(shape)
        self.books = [Book(self.pages[:, layer], c.head_width) for layer in range(c.layers)]
        self.free = list(range(self.count))[::-1]
        self.held = Counter[int]()
        self.given: set[int] = set()
        self.known: dict[bytes, int] = {}
        self.names: dict[int, bytes] = {}
        self.idle = OrderedDict[int, None]()
        """Known pages that nobody holds, the longest so first."""
        self.heads = slice(None)
        """Of the heads of keys and values, those that are kept here."""
        self.wrote: Callable[..., None] = lambda *_: None
        """Told of prefixes that are written."""

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self.free) + len(self.idle)

    def take(self) -> int:
        """Hold a page of one's own.

        Raises:
            Full: all are held.
        """
        if not self.free:
            self._forget()
        page = self.free.pop()
        self.held[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Hold a known page beside others."""
        self.idle.pop(page, None)
        self.held[page] += 1

    def drop(self, page: int) -> None:
        """Hold it no longer; known pages stay as long as nobody needs their room."""
        self.held[page] -= 1
        if self.held[page]:
            return
        del self.held[page]
        if page in self.names:
            self.idle[page] = None
        else:
            self.free.append(page)

    def write(self, pages: Sequence[int], first: int, before: Sequence[Before]) -> None:
        """Put a prefix, from its token number `first` on, into the pages of a sequence."""
        self.wrote(pages, first, before)
        self.pages[pages[(len(before[0].k_PKE) - 1) // SIDE]] = 0  # what is behind it is multiplied too
        table = torch.tensor(pages, dtype=torch.int32)
        for book, each in zip(self.books, before, strict=True):
            book.write(table, first, *(t[first:, self.heads].to(book.pages.dtype) for t in each))

    def learn(self, page: int, name: bytes) -> None:
        """Know a full page by what its tokens saw, if no other is known so."""
        if self.known.setdefault(name, page) == page:
            self.names[page] = name

    def find(self, root: bytes, ids: Sequence[int]) -> Iterator[int]:
        """Known pages of a sequence's beginning; each is to be held before another is taken."""
        for name in names(root, ids):
            if name not in self.known:
                return
            yield self.known[name]

    def pages_for(self, size_bytes: int) -> int:
        """How many pages something else of this size takes the place of."""
        return -(-size_bytes // self.page_bytes)

    def give(self, size_bytes: int) -> list[int]:
        """Give up pages for something else of this size, and their memory to the machine; none if there are too few."""
        count = max(1, self.pages_for(size_bytes))
        if count > self.available:
            return []
        while len(self.free) < count:
            self._forget()
        given = [self.free.pop() for _ in range(count)]
        self.given.update(given)
        for page in given:
            self._empty(page)
        return given

    def back(self, given: Sequence[int]) -> None:
        """Take pages back that were given up."""
        self.given.difference_update(given)
        self.free += given

    def _forget(self) -> None:
        if not self.idle:
            raise Full
        page, _ = self.idle.popitem(last=False)
        del self.known[self.names.pop(page)]
        self.free.append(page)

    def _empty(self, page: int) -> None:
        """Let the machine have the memory: whole pages of its own, within this one."""
        first = -(-page * self.page_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (page + 1) * self.page_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and sys.platform != "win32":
            self.memory.madvise(mmap.MADV_DONTNEED, first, last - first)


def _memory(size: int) -> mmap.mmap:
    """Memory of which nothing is there before it is written to; private, as what is shared is not given back."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def names(root: bytes, ids: Sequence[int]) -> Iterator[bytes]:
    """What each full page of a sequence is known by: what is worn, `root`, and every token up to its last."""
    name = root
    for at in range(0, len(ids) - SIDE + 1, SIDE):
        tokens = bytes((ctypes.c_int32 * SIDE)(*ids[at : at + SIDE]))
        name = hashlib.blake2b(name + tokens, digest_size=16).digest()
        yield name
